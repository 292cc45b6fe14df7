"""The dispatcher's library `tvm_ref`, in which the fused kernels are operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("tvm_ref", "DEF")


def define(schema: str, allocate: Callable[..., list[Any]], fill: Callable[..., None]) -> Any:
    """Defines an operator that returns a list of tensors, and returns its handle. Autograd does not know it.

    allocate: takes the arguments and returns the results, unwritten, with None for those that a call does not have;
    these are left out of the list.
    fill: takes the results of `allocate` and the arguments, and writes the results.
    """
    name = schema.split("(", maxsplit=1)[0]
    _LIBRARY.define(f"{schema} -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    def run(*arguments: Any) -> list[Tensor]:
        results = allocate(*arguments)
        with torch.cuda.device_of(_present(results)[0]):
            fill(results, *arguments)
        return _present(results)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tvm_ref::{name}", lambda *arguments: _present(allocate(*arguments)), lib=_LIBRARY)
    return getattr(torch.ops.tvm_ref, name).default


def _present(results: Sequence[Tensor | None]) -> list[Tensor]:
    return [result for result in results if result is not None]
