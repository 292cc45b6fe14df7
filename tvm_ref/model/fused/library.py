"""The dispatcher's library `tvm_ref`, in which the fused kernels are operators, so that torch.compile keeps them whole.

Autograd does not know the operators: stream.py and heads.py have the formulas.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

Maybe = Tensor | None
Record = TypeVar("Record", bound=tuple[Any, ...])
_LIBRARY = torch.library.Library("tvm_ref", "DEF")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Maybe: "Tensor?", int: "int", float: "float", torch.dtype: "ScalarType"
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
    arguments = ", ".join(f"{_TYPES[hint]} {field}" for field, hint in get_type_hints(record).items())
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(f"{name}({arguments}) -> Tensor[]", tags=tags)
    make: Callable[..., Record] = record

    def run(*arguments: Any) -> list[Tensor]:
        given = make(*arguments)
        results = allocate(given)
        with torch.cuda.device_of(_present(results)[0]):
            fill(given, results)
        return _present(results)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tvm_ref::{name}", lambda *given: _present(allocate(make(*given))), lib=_LIBRARY)
    handle: Callable[..., list[Tensor]] = getattr(torch.ops.tvm_ref, name).default
    return handle


def _present(results: Sequence[Maybe]) -> list[Tensor]:
    return [result for result in results if result is not None]
