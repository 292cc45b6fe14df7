"""The dispatcher operators `flashjvp::{forward, backward, forward_jvp, backward_jvp}`: schema, fake and vmap rules.

An operator takes the canonical arguments of the backends (see reference.py) and adds `backend` (None = the best for the
device) and `scale` None = D**-0.5. Results of a backward operator that are not `wanted` come back as empty tensors,
because a dispatcher operator cannot return None. The derivatives are in derivatives.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..layout import empty_lse, empty_rows, empty_statistic

Maybe = Tensor | None

library = torch.library.Library("flashjvp", "DEF")
_OPTIONS = "bool is_causal, float? scale, str? backend"
_TANGENTS = "Tensor? q_t, Tensor? k_t, Tensor? v_t"
_SCHEMAS = {
    "forward": f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)",
    "backward": "(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? mask, "
    f"{_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    "forward_jvp": f"(Tensor q, Tensor k, Tensor v, {_TANGENTS}, Tensor? mask, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "backward_jvp": f"(Tensor? d_o, Tensor? d_o_t, Tensor q, Tensor k, Tensor v, {_TANGENTS}, Tensor o, Tensor? o_t, "
    f"Tensor lse, Tensor mu, Tensor? mask, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

FORWARD = torch.ops.flashjvp.forward.default
BACKWARD = torch.ops.flashjvp.backward.default
FORWARD_JVP = torch.ops.flashjvp.forward_jvp.default
BACKWARD_JVP = torch.ops.flashjvp.backward_jvp.default
_NAMES = {FORWARD: "forward", BACKWARD: "backward", FORWARD_JVP: "forward_jvp", BACKWARD_JVP: "backward_jvp"}


# Implementations: pick the backend, fill in the scale, replace unwanted gradients by empty tensors.

# where q and the mask come among the tensors
_Q = {FORWARD: 0, BACKWARD: 1, FORWARD_JVP: 0, BACKWARD_JVP: 2}
_MASK = {FORWARD: 3, BACKWARD: 6, FORWARD_JVP: 6, BACKWARD_JVP: 12}


def _of_backend(
    op: Any, tensors: Sequence[Maybe], options: tuple[bool, float | None, str | None]
) -> tuple[Callable[..., Any], tuple[bool, float]]:
    """The function that computes an operator, and is_causal and scale as it takes them."""
    is_causal, scale, backend = options
    q = tensors[_Q[op]]
    assert q is not None
    module = select.resolve(backend, q.device, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return getattr(module, _NAMES[op]), (is_causal, scale)


def bound(
    op: Any, tensors: Sequence[Maybe], options: tuple[bool, float | None, str | None], *wanted: Any
) -> Callable[[Sequence[Maybe]], Any]:
    """What the backend computes of tensors like these, from them alone; None for gradients that are not `wanted`."""
    function, (is_causal, scale) = _of_backend(op, tensors, options)
    rest = (is_causal, scale, *wanted)
    if (bind := getattr(function, "bind", None)) is not None:
        to_these: Callable[[Sequence[Maybe]], Any] = bind(tensors, rest)
        return to_these
    return lambda given: function(*given, *rest)


def _call(op: Any, tensors: Sequence[Maybe], options: tuple[bool, float | None, str | None], *wanted: Any) -> Any:
    function, (is_causal, scale) = _of_backend(op, tensors, options)
    return function(*tensors, is_causal, scale, *wanted)


def _forward(q, k, v, mask, is_causal, scale, backend):  # type: ignore[no-untyped-def]
    return _call(FORWARD, (q, k, v, mask), (is_causal, scale, backend))


def _forward_jvp(q, k, v, q_t, k_t, v_t, mask, is_causal, scale, backend):  # type: ignore[no-untyped-def]
    return _call(FORWARD_JVP, (q, k, v, q_t, k_t, v_t, mask), (is_causal, scale, backend))


def _backward(d_o, q, k, v, o, lse, mask, is_causal, scale, backend, wanted):  # type: ignore[no-untyped-def]
    grads = _call(BACKWARD, (d_o, q, k, v, o, lse, mask), (is_causal, scale, backend), tuple(wanted))
    return _fill_unwanted(q, grads)


def _backward_jvp(d_o, d_o_t, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask, is_causal, scale, backend, wanted):  # type: ignore[no-untyped-def]
    tensors = (d_o, d_o_t, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask)
    return _fill_unwanted(q, _call(BACKWARD_JVP, tensors, (is_causal, scale, backend), tuple(wanted)))


def _fill_unwanted(q: Tensor, grads: Sequence[Maybe]) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


# Fake rules: shapes, dtypes and strides of the results.


def _fake_forward(q, k, v, mask, is_causal, scale, backend):  # type: ignore[no-untyped-def]
    return empty_rows(q, v.shape[-1]), empty_lse(q, mask)


def _fake_forward_jvp(q, k, v, q_t, k_t, v_t, mask, is_causal, scale, backend):  # type: ignore[no-untyped-def]
    width = v.shape[-1]
    return empty_rows(q, width), empty_rows(q, width), empty_lse(q, mask), empty_statistic(q)


def _fake_backward(d_o, q, k, v, o, lse, mask, is_causal, scale, backend, wanted):  # type: ignore[no-untyped-def]
    return _fake_gradients((q, k, v), wanted)


def _fake_backward_jvp(d_o, d_o_t, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask, is_causal, scale, backend, wanted):  # type: ignore[no-untyped-def]
    return _fake_gradients((q, k, v, q_t, k_t, v_t), wanted)


def _fake_gradients(inputs: Sequence[Maybe], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    first = inputs[0]
    assert first is not None
    return tuple(
        empty_rows(x, x.shape[-1]) if x is not None and want else first.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )


# vmap rules: the mapped dim becomes the leading batch dim of every tensor.


def mapped(op: Any, batch_size: int, in_dims: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """The arguments of an operator with the mapped dim in front, and tensors that have none expanded to it. Its
    arguments without a dim in `in_dims`, that are no tensors, stay as they are."""
    moved = []
    for i, (x, dim) in enumerate(zip(tensors, in_dims, strict=False)):
        if not isinstance(x, Tensor):
            moved.append(x)
        elif dim is not None:
            moved.append(x.movedim(dim, 0))
        else:
            x = x.unsqueeze(0)
            moved.append(x if i == _MASK[op] else x.expand(batch_size, *x.shape[1:]))
    return moved


def _vmap_rule(op: Any) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]:
    def rule(info, in_dims, *args):  # type: ignore[no-untyped-def]
        results = op(*mapped(op, info.batch_size, in_dims, args))
        if op not in (BACKWARD, BACKWARD_JVP):
            return results, (0,) * len(results)
        return results, tuple(0 if want else None for want in args[-1])

    return rule


IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    FORWARD: _forward,
    BACKWARD: _backward,
    FORWARD_JVP: _forward_jvp,
    BACKWARD_JVP: _backward_jvp,
}
_FAKES: dict[Any, Callable[..., Any]] = {
    FORWARD: _fake_forward,
    BACKWARD: _fake_backward,
    FORWARD_JVP: _fake_forward_jvp,
    BACKWARD_JVP: _fake_backward_jvp,
}
for _op, _implementation in IMPLEMENTATIONS.items():
    library.impl(_op, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(_op.name(), _FAKES[_op], lib=library)
    torch.library.register_vmap(_op.name(), _vmap_rule(_op), lib=library)
