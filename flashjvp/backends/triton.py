"""The triton backend: the four functions of a backend (see reference.py) on the kernels of kernels/."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..kernels.hopper import eligibility
from ..kernels.launch import call as launches
from ..kernels.launch import schedule, selfcheck
from ..kernels.launch.call import Call, Maybe
from ..kernels.launch.replay import captured, side_by_side
from ..kernels.portable.backward_bias import launch_backward_bias
from ..kernels.portable.backward_key import launch_backward_key
from ..kernels.portable.backward_preprocess import launch_preprocess
from ..kernels.portable.backward_query import launch_backward_query
from ..kernels.portable.forward import launch_forward
from ..kernels.portable.partial import DENSE, PARTIAL, Kernels
from ..layout import empty_bias, empty_rows
from ..operands import BackwardOperands, Inputs, Operands, PlainBackwardOperands, PlainOperands
from ..performance import warn_once
from .copies import made_on_copies
from .high import HALF, in_float32
from .patterns import Band, Listed

P = ParamSpec("P")
Results = TypeVar("Results", bound=tuple[Maybe, ...])

selfcheck.SUBJECT[:] = [(sys.modules[__name__], launches)]


def on_copies(record: Any) -> Callable[[Callable[P, Results]], Callable[P, Results]]:
    """Makes a call that raised Misfit anew, on copies. The first arguments of the function are the tensors of a record
    of operands.py."""

    def decorate(function: Callable[P, Results]) -> Callable[P, Results]:
        @functools.wraps(function)
        def run(*args: P.args, **none: P.kwargs) -> Results:
            try:
                return function(*args, **none)
            except eligibility.Misfit as misfit:
                addressed = misfit.addressed
            results: Any = made_on_copies(function, record, args, addressed)
            return results

        return run

    return decorate


@captured(PlainOperands)
@side_by_side
@on_copies(PlainOperands)
def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Maybe, seed: Maybe, is_causal: bool, scale: float, dropout_p: float,
    pattern: Band | Listed | None = None, high: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse."""
    call, inputs = Call(q, k, v, mask, is_causal, None, seed, dropout_p, pattern, high), Inputs(q, k, v)
    if (hopper := hopper_of(call, scale, inputs)) is not None:
        o, _, lse, _ = hopper.forward(call, inputs, scale)
        return o, lse
    if high and q.dtype in HALF:
        return in_float32(forward, PlainOperands(q, k, v, mask, seed), (is_causal, scale, dropout_p, None, True))
    o, _, lse, _ = launch_forward(call, inputs, mask, scale, jvp=False, kernel=_kernels(call).forward)
    return o, lse


@captured(Operands)
@side_by_side
@on_copies(Operands)
def forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe, seed: Maybe,
    is_causal: bool, scale: float, dropout_p: float, pattern: Band | Listed | None = None, high: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu."""
    inputs = Inputs(q, k, v, q_t, k_t, v_t)
    call = Call(q, k, v, mask, is_causal, mask_t, seed, dropout_p, pattern, high)
    if (hopper := hopper_of(call, scale, inputs)) is not None:
        results: tuple[Tensor, Tensor, Tensor, Tensor] = hopper.forward(call, inputs, scale)
        return results
    if high and q.dtype in HALF:
        operands = Operands(*inputs, mask, mask_t, seed)
        return in_float32(forward_jvp, operands, (is_causal, scale, dropout_p, None, True))
    o, o_t, lse, mu = launch_forward(call, inputs, mask, scale, jvp=True, kernel=_kernels(call).forward)
    assert o_t is not None and mu is not None
    return o, o_t, lse, mu


@captured(PlainBackwardOperands)
@side_by_side
def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, seed: Maybe, is_causal: bool,
    scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool], pattern: Band | Listed | None = None,
    high: bool = False,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_mask."""
    of_q, of_k, of_v, of_mask = wanted
    d_q, d_k, d_v, _, _, _, d_mask, _ = backward_jvp(
        d_o, None, q, k, v, None, None, None, o, None, lse, None, mask, None, seed, is_causal, scale, dropout_p,
        (of_q, of_k, of_v, False, False, False, of_mask, False), pattern, high,
    )  # fmt: skip
    return d_q, d_k, d_v, d_mask


@captured(BackwardOperands)
@side_by_side
@on_copies(BackwardOperands)
def backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
    o_t: Maybe, lse: Tensor, mu: Maybe, mask: Maybe, mask_t: Maybe, seed: Maybe, is_causal: bool, scale: float,
    dropout_p: float, wanted: tuple[bool, ...], pattern: Band | Listed | None = None, high: bool = False,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t.

    Without a cotangent of o_t those of tangents are zero.
    """
    given = Inputs(q, k, v, q_t, k_t, v_t)
    *wanted_of_inputs, of_mask, of_mask_t = wanted
    asked = Inputs(*[want and x is not None for want, x in zip(wanted_of_inputs, given, strict=True)])
    of_mask, of_mask_t = of_mask and mask is not None, of_mask_t and mask_t is not None
    call = Call(q, k, v, mask, is_causal, None if d_o_t is None else mask_t, seed, dropout_p, pattern, high)
    if call.is_empty:
        of_masks = _zeros_of_mask(mask, of_mask), _zeros_of_mask(mask_t, of_mask_t)
        return *[_zeros_like(x) if want else None for x, want in zip(given, asked, strict=True)], *of_masks
    inputs, computed = given, asked
    if d_o_t is None:  # no product then involves a tangent of q, k or v
        inputs = Inputs(q, k, v)
        computed = Inputs(asked.q, asked.k, asked.v, False, False, False)
    cotangents, kernels, statistics = (d_o, d_o_t), _kernels(call), None
    if any(computed) and (hopper := hopper_of(call, scale, inputs, d_o, d_o_t)) is not None:
        grads: tuple[Maybe, ...] = hopper.backward(call, inputs, cotangents, (o, o_t, lse, mu), scale, computed)
    elif high and q.dtype in HALF:
        operands = BackwardOperands._make((d_o, d_o_t, *given, o, o_t, lse, mu, mask, mask_t, seed))
        widened: tuple[Maybe, ...] = in_float32(
            backward_jvp, operands, (is_causal, scale, dropout_p, wanted, None, True)
        )
        return widened
    else:
        statistics = _statistics(call, cotangents, (o, o_t, lse, mu))
        d_q, d_q_t = launch_backward_query(call, inputs, cotangents, statistics, scale, computed, kernels.query)
        d_k, d_v, d_k_t, d_v_t = launch_backward_key(call, inputs, cotangents, statistics, scale, computed, kernels.key)
        grads = (d_q, d_k, d_v, d_q_t, d_k_t, d_v_t)
    d_mask: Maybe = None
    d_mask_t: Maybe = None
    if mask is not None and (of_mask or (of_mask_t and d_o_t is not None)):
        statistics = statistics or _statistics(call, cotangents, (o, o_t, lse, mu))
        d_mask, d_mask_t = launch_backward_bias(
            call, inputs, cotangents, statistics, scale, mask, (of_mask, of_mask_t and d_o_t is not None), kernels.bias
        )
    if d_o_t is not None:
        return *grads, d_mask, d_mask_t
    return *with_zeros(grads, given, asked), d_mask, _zeros_of_mask(mask_t, of_mask_t)


def _statistics(
    call: Call, cotangents: tuple[Maybe, Maybe], results: tuple[Tensor, Maybe, Tensor, Maybe]
) -> tuple[Maybe, ...]:
    """lse, mu, row_a, row_delta, as the portable kernels read them."""
    o, o_t, lse, mu = results
    row_a, row_delta = launch_preprocess(call, o, *cotangents, o, o_t)
    return lse, mu if cotangents[1] is not None else None, row_a, row_delta


def _kernels(call: Call) -> Kernels:
    """The portable kernels of a call."""
    return DENSE if call.pattern is None else PARTIAL


def hopper_of(call: Call, scale: float, inputs: Inputs, *cotangents: Maybe) -> ModuleType | None:
    """The launches of the warp-specialised kernels, if they serve the call. Raises Misfit of one that is to be made on
    copies, for whatever kernels."""
    if call.is_empty:
        return None
    in_use = schedule.pipelines(call.device, call.precision, call.width)
    if in_use and eligibility.obstacle(call, inputs, scale) is None:
        if (reason := eligibility.misfit(call, inputs, cotangents)) is not None:
            _make_on_copies(call, reason, addressed=call.precision == "half")
        from ..kernels.hopper import launch, wide_launch

        return wide_launch if call.width > eligibility.DENSE_WIDTH else launch
    if (reason := eligibility.misfit_of_narrow(call)) is not None:
        _make_on_copies(call, reason, addressed=False)
    if call.device.type == "cuda":
        _warn_of_portable_kernels(call, scale, inputs)
    return None


def _make_on_copies(call: Call, reason: str, addressed: bool) -> NoReturn:
    if call.device.type == "cuda":
        warn_once(f"{call.device} runs attention on copies: {reason}")
    raise eligibility.Misfit(addressed)


def _warn_of_portable_kernels(call: Call, scale: float, inputs: Inputs) -> None:
    """Where the user can change what keeps the warp-specialised ones off: the version of Triton."""
    has_tiles = schedule.has_pipelines(call.device, call.precision, call.width)
    if not has_tiles or eligibility.unwritten(call, inputs, scale) is not None:
        return
    reason = schedule.why_not_pipelines(call.device, call.precision, call.width) or eligibility.unmeasured(call)
    warn_once(f"{call.device} runs attention on the portable kernels, which are slower: {reason}")


def with_zeros(grads: tuple[Maybe, ...], given: Inputs, asked: Inputs) -> tuple[Maybe, ...]:
    """Gradients without a cotangent of o_t: the wanted ones of tangents are zero."""
    return tuple(
        _zeros_like(x) if i >= 3 and want else grad
        for i, (grad, x, want) in enumerate(zip(grads, given, asked, strict=True))
    )


def _zeros_of_mask(mask: Maybe, wanted: bool) -> Maybe:
    return torch.zeros_like(empty_bias(mask)) if wanted and mask is not None else None


def _zeros_like(x: Maybe) -> Maybe:
    # mutate: return x torch
    return None if x is None else torch.zeros_like(empty_rows(x, x.shape[-1]))
