"""A workaround for a data race in the Triton kernels that torch.compile (inductor) generates.

A reduction over more than 1024 channels becomes a kernel with several loops. A later loop loads from memory what an
earlier one stored. Next to bfloat16 operands, Triton gives the load another layout than the float32 store had. Then a
warp may read what another warp has yet to write, unless a reduction in between synchronises them. As a result, the
gradient of a modulation layer of width 1152 was random on a GPU (PyTorch up to 2.13; pytorch/pytorch#190517,
triton-lang/triton#10924).
"""

from functools import wraps
from typing import Any

from torch._inductor.codegen.triton import TritonKernel

_LOAD = TritonKernel.load


def wait_before_reading_back() -> None:
    """Adds a barrier before every such load, in all kernels that this process generates from now on.

    It replaces a method of inductor, which has no option or hook for this.
    """
    TritonKernel.load = _wait_and_load  # type: ignore[assignment, method-assign]


@wraps(_LOAD)
def _wait_and_load(kernel: Any, name: str, index: Any) -> Any:
    if name in kernel.cse.invalidated_stores:  # an earlier loop of this kernel stored it
        kernel.loads.writeline("tl.debug_barrier()")
    return _LOAD(kernel, name, index)
