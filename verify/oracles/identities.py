"""Identities that attention satisfies whatever the numbers, such as adjointness and linearity: one function each.

They need no second implementation. Each takes the inputs of a call and a subject (the backend that is judged, or a
wrong one in a test), and returns an Identity for each quantity that it compares. tolerance.py says how closely the two
sides must agree. Inputs that lack what an identity is about (a tangent, a cotangent) give an empty list.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from ..budget import tolerance
from ..budget.rounding import inner_product_bounds, rounding_bounds
from ..budget.tolerance import STEP, STEP_GRID, Identity
from ..cases.inputs import Inputs
from .attention import NAMES, QUERY_SIDE, Forward, Subject, dense64, differentiate

Check = Callable[[Inputs, Subject], list[Identity]]
TANGENTS = ("q_t", "k_t", "v_t")


def adjoint(inputs: Inputs, subject: Subject) -> list[Identity]:
    """<JVP(x_t), d> = <x_t, VJP(d)>: the tangent of the forward pass against the backward pass of plain attention.

    Once for a random d, the cotangent of o_t, which sees every error but has terms that cancel. Once for d = o_t (over
    its largest element, lest float16 overflows), where nothing cancels.
    """
    if not inputs.has_tangent or inputs.d_o_t is None:
        return []
    o_t = _present(subject.results(replace(inputs, d_o=None)).o_t)
    found = []
    along = o_t / o_t.abs().amax().clamp(min=torch.finfo(o_t.dtype).tiny) if o_t.numel() else o_t
    for quantity, d in (("d = d_o_t", inputs.d_o_t), ("d = o_t", along)):
        forward = replace(inputs, d_o=None, d_o_t=d)
        plain = replace(inputs, q_t=None, k_t=None, v_t=None, d_o=d, d_o_t=None)
        vjp = subject.results(plain)
        pairs = zip((inputs.q_t, inputs.k_t, inputs.v_t), (vjp.d_q, vjp.d_k, vjp.d_v), strict=True)
        right = torch.stack([_dot(x_t, d_x) for x_t, d_x in pairs if x_t is not None]).sum()
        found.append(tolerance.adjoint(quantity, forward, plain, _dot(o_t, d), right))
    return found


def linear_in_tangents(inputs: Inputs, subject: Subject, a: float = 0.5, b: float = 3.0) -> list[Identity]:
    """o_t(a x_t + b y_t) = a o_t(x_t) + b o_t(y_t), with tangents whose sums are exact in every type."""
    present = [name for name in TANGENTS if getattr(inputs, name) is not None]
    if not present:
        return []
    # multiples of 1/8 up to 4: their sums with these factors have at most 8 significand bits, which bfloat16 has
    first = {name: multiples(getattr(inputs, name).clamp(-4, 4), 1 / 8) for name in present}
    second = {name: first[name].flip(-1, -2) for name in present}
    both = {name: a * first[name] + b * second[name] for name in present}
    calls = [_changed(inputs, tangents) for tangents in (both, first, second)]
    o_t, *terms = [(call, _present(subject.results(call).o_t)) for call in calls]
    return [tolerance.linear(o_t, (a, *terms[0]), (b, *terms[1]))]


def permuted_keys(inputs: Inputs, subject: Subject, order: Sequence[int] | None = None) -> list[Identity]:
    """Keys, values, their tangents and the mask in another order: their gradients in that order, the rest unchanged."""
    n = inputs.k.shape[-2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist() if order is None else order

    def keys(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., order, :]

    inputs = replace(inputs, is_causal=False)
    mask = inputs.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., order]
    k, v = inputs.k[..., order, :], inputs.v[..., order, :]
    permuted = replace(inputs, k=k, v=v, k_t=keys(inputs.k_t), v_t=keys(inputs.v_t), mask=mask)
    results = subject.results(inputs)
    of_keys: dict[str, Any] = {name: keys(getattr(results, name)) for name in NAMES if name not in QUERY_SIDE}
    return tolerance.same_results(subject.results(permuted), replace(results, **of_keys), inputs, permuted)


def shifted_rows(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A number that an additive mask adds to all scores of a row changes nothing."""
    m, n, device = inputs.q.shape[-2], inputs.k.shape[-2], inputs.q.device
    mask = inputs.mask
    if mask is None:
        mask = torch.zeros(m, n, device=device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    mask = multiples(mask.float(), 1 / 64)  # so that the sum with a shift is exact
    shift = 7 * torch.arange(-5, m - 5, dtype=torch.float32, device=device)[:, None].clamp(max=30)
    plain, shifted = replace(inputs, mask=mask), replace(inputs, mask=mask + shift)
    return tolerance.same_results(subject.results(shifted), subject.results(plain), plain, shifted)


def independent_heads(
    inputs: Inputs, subject: Subject, group: tuple[tuple[int, ...], int] | None = None
) -> list[Identity]:
    """A call on one key head of one batch element alone (by default the last) gives that part of the results."""
    *batch, kv_heads = inputs.k.shape[:-2]
    if 0 in batch:
        return []
    group = (tuple(size - 1 for size in batch), kv_heads - 1) if group is None else group
    part = inputs.group(*group)
    return tolerance.same_results(subject.results(part), subject.results(inputs).group(*group), part, part)


def merged_keys(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Forward passes over two disjoint sets of keys merge to that over all of them, by lse and mu: MATH.md (8)."""
    n = inputs.k.shape[-2]
    if n < 2:
        return []
    inputs = replace(inputs, is_causal=False)
    calls = [_keys(inputs, slice(0, n // 3 + 1)), _keys(inputs, slice(n // 3 + 1, n))]
    whole, parts = subject.forward(inputs), [subject.forward(call) for call in calls]
    o_i, o_t_i, lse_i, mu_i = (torch.stack(list(x)).double() for x in zip(*parts, strict=True))
    lse = lse_i.logsumexp(0)
    w = lse_i.softmax(0).masked_fill(lse.isneginf(), 0.0)  # exp(lse_i - lse), which a large lse would round away
    W = w[..., None]
    o, mu = (W * o_i).sum(0), (w * mu_i).sum(0)
    o_t = (W * (o_t_i + mu_i[..., None] * o_i)).sum(0) - mu[..., None] * o
    weighed = list(zip(w, parts, calls, strict=True))
    return tolerance.merged(whole, Forward(o, o_t, lse, mu), inputs, weighed)


def finite_differences(inputs: Inputs, subject: Subject) -> list[Identity]:
    """o_t and every gradient are the limit of central difference quotients of float64 dense attention's values.

    A gradient in one direction, half along itself, where no digits cancel, half random, which sees every error.
    """
    inputs = inputs.map(lambda x: x if x.dtype == torch.bool else multiples(x, STEP_GRID))
    results, wide = subject.results(inputs), inputs.map(lambda x: x if x.dtype == torch.bool else x.double())
    value_bounds = rounding_bounds(wide)
    found = []
    if results.o_t is not None:
        moves = {x: tangent for x in "qkv" if (tangent := getattr(wide, f"{x}_t")) is not None}
        quotients = _quotients(wide, moves, lambda call: dense64(call).o)
        bounds = value_bounds["o"].whole, rounding_bounds(inputs)["o_t"].whole
        found.append(tolerance.finite_difference("o_t", results.o_t, quotients, *bounds))

    def loss(call: Inputs) -> Tensor:
        exact = dense64(call)
        return _dot(exact.o, wide.d_o) + _dot(exact.o_t, wide.d_o_t)

    cotangents = {o: d for o, d in (("o", wide.d_o), ("o_t", wide.d_o_t)) if d is not None}
    loss_bound = sum(inner_product_bounds(wide, cotangents).values())
    generator = torch.Generator(wide.q.device).manual_seed(0)
    directions = {
        name: _direction(_present(getattr(results, f"d_{name}")), generator)
        for name in ("q", "k", "v", *TANGENTS)
        if getattr(wide, name) is not None
    }
    bounds_of = inner_product_bounds(inputs, {f"d_{name}": x for name, x in directions.items()})
    for name, direction in directions.items():
        gradient = f"d_{name}"
        quotients = _quotients(wide, {name: direction}, loss)
        derivative = _dot(getattr(results, gradient), direction)
        found.append(tolerance.finite_difference(gradient, derivative, quotients, loss_bound, bounds_of[gradient]))
    return found


def same_in_forward_mode(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Plain attention under torch.func.jvp, then reverse mode, gives what the explicit call gives."""
    results = differentiate(subject.attention(inputs), inputs)
    return tolerance.same_results(results, subject.results(inputs), inputs, inputs)


def same_as_reference(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The backend and the reference backend give the same."""
    return tolerance.same_results(subject.results(inputs), Subject("reference").results(inputs), inputs, inputs)


def deterministic(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Two runs give the same bits."""
    return tolerance.same_bits(subject.results(inputs), subject.results(inputs))


def gradcheck_backward(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.autograd.gradcheck in float64: reverse mode of plain attention, one and many cotangents at a time."""
    return _gradcheck("backward", subject.attention(inputs), inputs, "qkv", check_batched_grad=True)


def gradcheck_forward_mode(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.autograd.gradcheck in float64: forward mode of plain attention, one tangent at a time."""
    modes = {"check_forward_ad": True, "check_backward_ad": False}
    return _gradcheck("forward mode", subject.attention(inputs), inputs, "qkv", **modes)


def gradcheck_reverse_over_forward(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.autograd.gradcheck in float64: reverse mode of attention under torch.func.jvp, to primals and tangents."""
    attention = subject.attention(inputs)

    def jvp(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        o, o_t = torch.func.jvp(attention, (q, k, v), tangents)[:2]
        return o, o_t

    return _gradcheck("reverse over forward", jvp, inputs, ("q", "k", "v", *TANGENTS), check_batched_grad=True)


IDENTITIES: dict[str, Check] = {
    "adjoint": adjoint,
    "linear": linear_in_tangents,
    "permutation": permuted_keys,
    "shift": shifted_rows,
    "slices": independent_heads,
    "merge": merged_keys,
    "differences": finite_differences,
    "forward-mode": same_in_forward_mode,
    "agreement": same_as_reference,
    "determinism": deterministic,
}
GRADCHECKS: dict[str, Check] = {
    "gradcheck": gradcheck_backward,
    "gradcheck-forward": gradcheck_forward_mode,
    "gradcheck-both": gradcheck_reverse_over_forward,
}
"""gradcheck perturbs every element of float64 inputs by itself: for tiny cases, on backends that take float64."""


def _changed(inputs: Inputs, tensors: Mapping[str, Tensor]) -> Inputs:
    changes: dict[str, Any] = dict(tensors)
    return replace(inputs, **changes)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _dot(x: Tensor | None, y: Tensor | None) -> Tensor:
    if x is None or y is None:
        return torch.zeros((), dtype=torch.float64)
    return (x.double() * y.double()).sum().cpu()


def multiples(x: Tensor, step: float) -> Tensor:
    """x rounded to multiples of a power of two: few digits, so that sums and steps are exact."""
    return ((x.double() / step).round() * step).to(x.dtype)


def _direction(gradient: Tensor, generator: torch.Generator) -> Tensor:
    gradient = gradient.double()
    noise = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device).normal_(generator=generator)
    size = gradient.norm()
    along = torch.where(size > 0, gradient * (noise.norm() / size), 0.0)
    return multiples(along + noise, STEP_GRID)


def _keys(inputs: Inputs, keys: slice) -> Inputs:
    """The call on some of the keys."""
    k, v, k_t, v_t = (
        None if x is None else x[..., keys, :] for x in (inputs.k, inputs.v, inputs.k_t, inputs.v_t)
    )  # fmt: skip
    assert k is not None and v is not None
    mask = inputs.mask if inputs.mask is None or inputs.mask.shape[-1] == 1 else inputs.mask[..., keys]
    return replace(inputs, k=k, v=v, k_t=k_t, v_t=v_t, mask=mask)


def _quotients(inputs: Inputs, moves: dict[str, Tensor], value: Callable[[Inputs], Tensor]) -> tuple[Tensor, Tensor]:
    """(value(x + h move) - value(x - h move)) / 2 h for h = STEP and 2 STEP."""

    def moved(h: float) -> Tensor:
        return value(_changed(inputs, {name: getattr(inputs, name) + h * move for name, move in moves.items()}))

    once, twice = ((moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    return once, twice


def _gradcheck(
    quantity: str, function: Callable[..., Any], inputs: Inputs, names: Sequence[str], **modes: bool
) -> list[Identity]:
    inputs = inputs.map(lambda x: x if x.dtype == torch.bool else multiples(x, STEP_GRID))
    leaves = [getattr(inputs, name).detach().clone().requires_grad_() for name in names]
    tolerances: dict[str, Any] = tolerance.gradcheck(inputs)
    try:
        torch.autograd.gradcheck(function, leaves, **tolerances, **modes)
    except GradcheckError as error:
        return [Identity(quantity, None, tolerances["atol"], False, " ".join(str(error).split())[:300])]
    return [Identity(quantity, None, tolerances["atol"], True)]
