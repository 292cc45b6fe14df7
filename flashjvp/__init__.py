"""FlashAttention with its Jacobian-vector product, differentiable in reverse through both outputs."""

from . import _commands  # isort: skip # noqa: F401 - first: what follows imports PyTorch, for seconds
from .api import attention, attention_jvp
from .checkpoint import checkpoint
from .diagnosis.diagnose import check
from .diagnosis.findings import CheckReport, Comparison, Diagnosis, Finding
from .errors import (
    ArgumentTypeError,
    ArgumentValueError,
    FlashJVPError,
    FlashJVPPerformanceWarning,
    SecondOrderError,
    UnsupportedError,
)
from .explain import Explanation, explain
from .integrations.replaced import install, replaced, uninstall
from .neighbourhood import neighbourhood
from .norms import batch_norm, layer_norm
from .precompile import precompile
from .varlen import attention_varlen, attention_varlen_jvp
from .varlen import varlen as varlen

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "CheckReport",
    "Comparison",
    "Diagnosis",
    "Explanation",
    "Finding",
    "FlashJVPError",
    "FlashJVPPerformanceWarning",
    "SecondOrderError",
    "UnsupportedError",
    "attention",
    "attention_jvp",
    "attention_varlen",
    "attention_varlen_jvp",
    "batch_norm",
    "check",
    "checkpoint",
    "explain",
    "install",
    "layer_norm",
    "neighbourhood",
    "precompile",
    "replaced",
    "uninstall",
]
