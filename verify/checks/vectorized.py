"""Several cotangents or tangents at once, by vmap and jacobians: each must give what its own explicit call gives.

Only the cotangents (or tangents) are mapped, not the tensors of the call. So what the forward pass saved reaches the
backward pass expanded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import jacrev, vjp, vmap

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Results, Subject, operands
from ..oracles.identities import TANGENTS
from .derivatives import forward_mode, placed

Outputs = tuple[Tensor | None, ...]


def mapped_cotangents(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.func.vjp of torch.func.jvp, called for one cotangent and, by torch.func.vmap, for two."""
    of, present = _outputs(inputs, subject), _present(inputs)

    def used(*xs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        outputs = of(*xs)
        return _with_cotangent(outputs, inputs), [y for y in outputs if y is not None]

    calls = _calls(inputs)
    pulled: Any = vjp(used, *(operands(inputs)[i] for i in present), has_aux=True)
    _, pull, (o, *o_t) = pulled
    outputs = o, *(o_t or [None])
    cotangents = [_cotangents(call) for call in calls]
    rows = vmap(pull)([torch.stack(pair) for pair in zip(*cotangents, strict=True)])
    explicit = [(call, subject.results(call)) for call in calls]
    found = _as_explicit("func.vjp", [pull(cotangents[0])], outputs, explicit[:1])
    return found + _as_explicit("vmap of it", list(zip(*rows, strict=True)), outputs, explicit)


def vectorized_jacobians(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.func.jacrev, and torch.autograd.functional.jacobian with vectorize=True by either strategy."""
    of, present, calls = _outputs(inputs, subject), _present(inputs), _calls(inputs)
    tensors = tuple(operands(inputs)[i].detach() for i in present)

    def products(*xs: Tensor) -> Tensor:
        """The inner products of the outputs with each call's cotangents: their gradients are those of the calls."""
        outputs = of(*xs)
        pairs = [zip(_with_cotangent(outputs, call), _cotangents(call), strict=True) for call in calls]
        return torch.stack([torch.stack([(y * d).sum() for y, d in pair]).sum() for pair in pairs])

    ways: dict[str, Any] = {
        "jacrev": jacrev(products, argnums=tuple(range(len(tensors))))(*tensors),
        "jacobian": jacobian(products, tensors, vectorize=True),
    }
    outputs, explicit = of(*tensors), [(call, subject.results(call)) for call in calls]
    found = []
    for name, rows in ways.items():
        found += _as_explicit(name, list(zip(*rows, strict=True)), outputs, explicit)
    return found + _columns(inputs, subject)


def _columns(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The derivative along each tangent alone, all of them by one vectorized call in forward mode."""
    primals, tangents = operands(inputs)[:3], operands(inputs)[3:]
    given = [i for i, x in enumerate(tangents) if x is not None]
    if not given:
        return []
    f = subject.attention(inputs)

    def moved(steps: Tensor) -> Tensor:
        xs = [primals[i] + step * tangents[i] for i, step in zip(given, steps.unbind(), strict=True)]
        return f(*placed(xs, given, primals))

    steps = inputs.q.new_zeros(len(given))
    columns: Any = jacobian(moved, steps, vectorize=True, strategy="forward-mode")
    found = []
    for i, column in zip(given, columns.unbind(-1), strict=True):
        alone: dict[str, Any] = {x: tangents[i] if place == i else None for place, x in enumerate(TANGENTS)}
        call = replace(inputs, **alone)
        explicit = subject.results(call)
        found += tolerance.same_results(replace(explicit, o_t=column), explicit, call, call)
    return [replace(x, quantity=f"{x.quantity}, forward-mode") for x in found if x.quantity == "o_t"]


def _outputs(inputs: Inputs, subject: Subject) -> Callable[..., Outputs]:
    """o and o_t, None without tangents, as a function of the operands that are there."""
    attention, given, present = subject.attention(inputs), operands(inputs), _present(inputs)

    def outputs(*xs: Tensor) -> Outputs:
        tensors = placed(xs, present, given)
        return forward_mode(attention, tensors[:3], tensors[3:])

    return outputs


def _present(inputs: Inputs) -> list[int]:
    return [i for i, x in enumerate(operands(inputs)) if x is not None]


def _calls(inputs: Inputs) -> list[Inputs]:
    """The call, and with other cotangents."""
    other: dict[str, Any] = {
        name: d.flip(-1, -2) for name in ("d_o", "d_o_t") if (d := getattr(inputs, name)) is not None
    }
    return [inputs, replace(inputs, **other)]


def _cotangents(inputs: Inputs) -> list[Tensor]:
    return [d for d in (inputs.d_o, inputs.d_o_t) if d is not None]


def _with_cotangent(outputs: Outputs, inputs: Inputs) -> list[Tensor]:
    pairs = zip(outputs, (inputs.d_o, inputs.d_o_t), strict=True)
    return [y for y, d in pairs if y is not None and d is not None]


def _as_explicit(way: str, rows: list[Any], outputs: Outputs, explicit: list[tuple[Inputs, Results]]) -> list[Identity]:
    """The gradients `rows` of each call, of the operands that are there, are those of the explicit call."""
    found = []
    for row, (call, results) in zip(rows, explicit, strict=True):
        o, o_t = (None if y is None else y.detach() for y in outputs)
        grads: list[Any] = placed(row, _present(call), [None] * 6)
        assert o is not None
        found += tolerance.same_results(Results(o, o_t, *grads), results, call, call)
    return [replace(x, quantity=f"{x.quantity}, {way}") for x in found]
