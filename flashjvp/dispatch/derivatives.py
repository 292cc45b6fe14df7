"""attention and attention_jvp of checked operands, with their derivatives.

Autograd kernels for each level of functorch give these (autograd.py) or, where PyTorch lacks what that needs, public
Functions (public_autograd.py).
"""

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from .._torch.eager import marked
from ..operands import Operands, Options
from ..performance import warn_once
from . import operators as operators  # importing it registers what the operators do
from .schema import FORWARD, FORWARD_JVP

# Whether PyTorch has what autograd.py needs, and it does what it did when that was written.
BY_LEVEL = _torch.PER_LEVEL and (torch.__version__.startswith(_torch.TRIED) or probe.holds())

if BY_LEVEL:
    from .autograd import BoundGradients as BoundGradients  # importing it registers the derivatives of the operators
    from .autograd import record as record
else:
    from . import public_autograd

    warn_once(
        f"torch {torch.__version__} has changed what flashjvp builds its derivatives on. They are right, take about "
        "twice the time, and torch.compile breaks its graph at them. Releases that were tried begin with "
        f"{', '.join(_torch.TRIED)}"
    )


def attention(operands: Operands, options: Options) -> Tensor:
    """o of canonical operands without tangents, differentiable in both modes."""
    if not BY_LEVEL:
        return public_autograd.attention(operands, options)
    o: Tensor
    if torch.compiler.is_compiling() or not _torch.dual_level_active():
        o = FORWARD.handle(*operands.plain, *options)[0]
        return o
    with marked("public"):
        o = FORWARD.handle(*operands.plain, *options)[0]
        return o


def attention_jvp(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """o and o_t of canonical operands, differentiable in reverse mode."""
    if not operands.has_tangents:
        o = attention(operands, options)
        return o, torch.zeros_like(o)
    if not BY_LEVEL:
        return public_autograd.attention_jvp(operands, options)
    o, o_t, _, _ = FORWARD_JVP.handle(*operands, *options)
    return o, o_t
