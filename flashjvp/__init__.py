"""FlashAttention with its Jacobian-vector product, differentiable in reverse through both outputs."""

from .api import attention, attention_jvp
from .diagnosis.diagnose import check
from .diagnosis.findings import CheckReport
from .errors import (
    ArgumentTypeError,
    ArgumentValueError,
    FlashJVPError,
    FlashJVPPerformanceWarning,
    SecondOrderError,
    UnsupportedError,
)
from .explain import Explanation, explain

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "Explanation",
    "FlashJVPError",
    "FlashJVPPerformanceWarning",
    "CheckReport",
    "SecondOrderError",
    "UnsupportedError",
    "attention",
    "attention_jvp",
    "check",
    "explain",
]
