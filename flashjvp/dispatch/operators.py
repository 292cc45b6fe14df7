"""What the dispatcher's operators do: call a backend, infer shapes (fake rules), and map over a dim (vmap rules).

The schemas are in schema.py, the derivatives in derivatives.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.eager import without_autocast
from ..backends import select
from ..layout import empty_bias, empty_lse, empty_rows, empty_statistic
from ..operands import AnyOperands, BackwardOperands, Operands, Options, PlainBackwardOperands, PlainOperands
from .schema import BACKWARD, BACKWARD_JVP, FORWARD, FORWARD_JVP, OPERATORS, Operator, library

Maybe = Tensor | None
Bound = Callable[[Sequence[Maybe]], Any]


# Implementations: pick the backend, fill in the scale, replace unwanted gradients by empty tensors.


def _of_backend(operator: Operator, operands: Any, options: Options) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The backend's function that computes an operator, and the options as it takes them."""
    q, v = operands.q, operands.v
    module = select.serving(options.backend, q, v)
    # mutate: return getattr module
    return getattr(module, operator.name), options.of_backend(q)


def bound(
    operator: Operator, operands: AnyOperands, options: Options, *wanted: tuple[bool, ...], autocast: bool = False
) -> Bound:
    """The operator without the dispatcher, for operands like these: a function of the tensors alone.

    Gradients that are not `wanted` are None. `autocast` says that it is on where the function is called.
    """
    function, rest = _of_backend(operator, operands, options)
    bind = getattr(function, "bind", None)
    if bind is not None and (to_these := bind(operands, (*rest, *wanted))) is not None:
        found: Bound = to_these
        return found  # kernels multiply there, which autocast does not see
    if autocast:
        return _without_autocast(lambda tensors: function(*tensors, *rest, *wanted))
    return lambda tensors: function(*tensors, *rest, *wanted)  # mutate: return tensors function


def _without_autocast(run: Bound) -> Bound:
    def excluding(tensors: Sequence[Maybe]) -> Any:
        with without_autocast():
            return run(tensors)

    return excluding


def prepared(operator: Operator, operands: Any, options: Options, wanted: Sequence[Any]) -> Callable[[], Any]:
    """The backend's function that computes an operator, filled in with what `Operator.split` gives."""
    function, rest = _of_backend(operator, operands, options)
    return functools.partial(function, *operands, *rest, *map(tuple, wanted))


def without_none(operator: Operator, operands: Any, results: Sequence[Maybe]) -> Any:
    """The results as a dispatcher operator returns them: an empty tensor for each gradient that is None."""
    if not operator.is_backward:
        return results
    return tuple([operands.q.new_empty(0) if grad is None else grad for grad in results])


def _implementation(operator: Operator) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        operands, options, wanted = operator.split(args)
        return without_none(operator, operands, prepared(operator, operands, options, wanted)())

    return implementation


# Fake rules: shapes, dtypes and strides of the results.


def _fake_forward(x: PlainOperands, options: Options) -> tuple[Tensor, ...]:
    return empty_rows(x.q, x.v.shape[-1], select.result_dtype(options.backend, x.q.dtype)), empty_lse(x.q, x.mask)


def _fake_forward_jvp(x: Operands, options: Options) -> tuple[Tensor, ...]:
    o, o_t = (empty_rows(x.q, x.v.shape[-1], select.result_dtype(options.backend, x.q.dtype)) for _ in range(2))
    return o, o_t, empty_lse(x.q, x.mask), empty_statistic(x.q)


def _fake_backward(x: PlainBackwardOperands, _: Options, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return _fake_gradients((x.q, x.k, x.v), (x.mask,), wanted)


def _fake_backward_jvp(x: BackwardOperands, _: Options, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return _fake_gradients((x.q, x.k, x.v, x.q_t, x.k_t, x.v_t), (x.mask, x.mask_t), wanted)


def _fake_gradients(inputs: Sequence[Maybe], masks: Sequence[Maybe], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    first = inputs[0]
    assert first is not None
    grads = [None if x is None else empty_rows(x, x.shape[-1]) for x in inputs]
    grads += [None if x is None else empty_bias(x) for x in masks]
    return tuple(first.new_empty(0) if x is None or not want else x for x, want in zip(grads, wanted, strict=True))


_FAKES: dict[Operator, Callable[..., Any]] = {
    FORWARD: _fake_forward, BACKWARD: _fake_backward, FORWARD_JVP: _fake_forward_jvp, BACKWARD_JVP: _fake_backward_jvp
}  # fmt: skip


def _fake_rule(operator: Operator) -> Callable[..., Any]:
    def rule(*args: Any) -> tuple[Tensor, ...]:
        operands, options, wanted = operator.split(args)
        results: tuple[Tensor, ...] = _FAKES[operator](operands, options, *wanted)
        return results

    return rule


# vmap rules: the mapped dim becomes the leading batch dim of every tensor.


def mapped(
    operator: Operator, batch_size: int, in_dims: Sequence[Any], operands: Sequence[Maybe], wanted: Sequence[bool] = ()
) -> list[Maybe]:
    """The tensors with the mapped dim in front.

    Those that have none are expanded to it, but for the seed and for the mask: of this only where each entry has a
    gradient of its own, or where its tangent is mapped, which has its shape.
    """
    dims = dict(zip(operator.operands._fields, in_dims, strict=False))
    whole = any(dims.get(name) is not None for name in ("mask", "mask_t")) or any(
        wanted[3 if operator is BACKWARD else 6 :]
    )
    moved: list[Maybe] = []
    for (name, dim), x in zip(dims.items(), operands, strict=False):
        if x is None:
            moved.append(None)
        elif dim is not None:
            moved.append(x.movedim(dim, 0))  # mutate: moved.append
        else:
            x = x.unsqueeze(0)
            stays = name == "seed" or (name in ("mask", "mask_t") and not whole)
            moved.append(x if stays else x.expand(batch_size, *x.shape[1:]))
    return moved


def _vmap_rule(operator: Operator) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]:
    def rule(info, in_dims, *args):  # type: ignore[no-untyped-def]
        operands, options, wanted = operator.split(args)
        moved = mapped(operator, info.batch_size, in_dims, operands, *wanted)
        results = operator.handle(*moved, *options, *wanted)
        if not operator.is_backward:
            return results, (0,) * len(results)
        return results, tuple(0 if want else None for want in args[-1])

    return rule


for _operator in OPERATORS:
    library.impl(_operator.handle, _implementation(_operator), "CompositeExplicitAutograd")
    torch.library.register_fake(_operator.handle.name(), _fake_rule(_operator), lib=library)
    torch.library.register_vmap(_operator.handle.name(), _vmap_rule(_operator), lib=library)
