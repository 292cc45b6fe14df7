"""attention and attention_jvp of canonical arguments, with their derivatives: by level of functorch (autograd.py), or
where PyTorch has not what that needs, by public Functions (public_autograd.py)."""

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from .._torch.eager import marked
from ..performance import warn_once
from .operators import FORWARD, FORWARD_JVP

# Whether PyTorch has what autograd.py needs, and it does what it did when that was written.
BY_LEVEL = _torch.PER_LEVEL and (torch.__version__.startswith(_torch.TRIED) or probe.holds())

if BY_LEVEL:
    from .autograd import record as record  # importing it registers the derivatives of the operators
else:
    from . import public_autograd

    warn_once(
        f"torch {torch.__version__} has changed what flashjvp builds its derivatives on. They are right, take about "
        "twice the time, and torch.compile breaks its graph at them. Releases that were tried begin with "
        f"{', '.join(_torch.TRIED)}"
    )

Maybe = Tensor | None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool, scale: float | None, backend: str | None
) -> Tensor:
    """o of canonical arguments, differentiable in both modes."""
    args = q, k, v, mask, is_causal, scale, backend
    if not BY_LEVEL:
        return public_autograd.attention(*args)
    o: Tensor
    if torch.compiler.is_compiling() or not _torch.dual_level_active():
        o = FORWARD(*args)[0]
        return o
    with marked("public"):
        o = FORWARD(*args)[0]
        return o


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, is_causal: bool, scale: float |
    None, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and o_t of canonical arguments, differentiable in reverse mode."""
    if q_t is None and k_t is None and v_t is None:
        o = attention(q, k, v, mask, is_causal, scale, backend)
        return o, torch.zeros_like(o)
    args = q, k, v, q_t, k_t, v_t, mask, is_causal, scale, backend
    if not BY_LEVEL:
        return public_autograd.attention_jvp(*args)
    o, o_t, _, _ = FORWARD_JVP(*args)
    return o, o_t
