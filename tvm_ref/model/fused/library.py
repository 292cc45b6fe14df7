"""The dispatcher's library `tvm_ref`, in which the fused kernels are operators, so that torch.compile keeps them whole.

A pass of a kernel is an operator that autograd does not know (`define`). What joins a forward and a backward pass is
an operator too, composed of them (`differentiable`).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

Maybe = Tensor | None
Record = TypeVar("Record", bound=tuple[Any, ...])
_LIBRARY = torch.library.Library("tvm_ref", "DEF")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Maybe: "Tensor?", bool: "bool", int: "int", float: "float", torch.dtype: "ScalarType"
}  # fmt: skip


def define(
    name: str,
    record: type[Record],
    allocate: Callable[[Record], list[Maybe]],
    fill: Callable[[Record, list[Maybe]], None],
) -> Callable[..., list[Tensor]]:
    """Defines an operator, and returns its handle, which takes the fields of `record`, a NamedTuple.

    allocate: returns the results, unwritten, with None for those that a call does not have. The operator leaves these
    out of the list that it returns.
    fill: writes the results.
    """
    _declare(name, get_type_hints(record))
    make: Callable[..., Record] = record

    def run(*arguments: Any) -> list[Tensor]:
        given = make(*arguments)
        results = allocate(given)
        with torch.cuda.device_of(_present(results)[0]):
            fill(given, results)
        return _present(results)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tvm_ref::{name}", lambda *given: _present(allocate(make(*given))), lib=_LIBRARY)
    return _handle(name)


def differentiable(
    name: str, hints: dict[str, Any], function: type[torch.autograd.Function]
) -> Callable[..., list[Tensor]]:
    """Defines an operator that applies a function of autograd to arguments of these types, and returns its handle.

    An `autograd.Function` by itself would lose activation checkpointing's marks when it is compiled (torch 2.11): what
    it computes would be kept, not computed again.
    """
    _declare(name, hints)
    _LIBRARY.impl(name, lambda *given: list(function.apply(*given)), "CompositeImplicitAutograd")
    return _handle(name)


def _declare(name: str, hints: dict[str, Any]) -> None:
    arguments = ", ".join(f"{_TYPES[hint]} {argument}" for argument, hint in hints.items())
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(f"{name}({arguments}) -> Tensor[]", tags=tags)


def _handle(name: str) -> Callable[..., list[Tensor]]:
    handle: Callable[..., list[Tensor]] = getattr(torch.ops.tvm_ref, name).default
    return handle


def _present(results: Sequence[Maybe]) -> list[Tensor]:
    return [result for result in results if result is not None]
