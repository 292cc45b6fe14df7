"""A guard against a data race in the Triton kernels that inductor generates.

A reduction over more than 1024 channels becomes a kernel of several loops, of which a later one reads from memory what
an earlier one stored. Next to bfloat16 operands Triton gives such a load another layout than the store of float32 had,
so that a warp reads what another has yet to write, unless a reduction in between makes it wait: the gradient of a
modulation of width 1152 was random on a GPU (PyTorch up to 2.13; pytorch/pytorch#190517, triton-lang/triton#10924).
"""

from functools import wraps
from typing import Any

from torch._inductor.codegen.triton import TritonKernel

_LOAD = TritonKernel.load


def wait_before_reading_back() -> None:
    """Makes the kernels generated in this process from now on wait before they read what they stored.

    By replacing a method of inductor's, which has no option or hook for it.
    """
    TritonKernel.load = _wait_and_load  # type: ignore[assignment, method-assign]


@wraps(_LOAD)
def _wait_and_load(kernel: Any, name: str, index: Any) -> Any:
    if name in kernel.cse.invalidated_stores:  # what an earlier loop of this kernel stored
        kernel.loads.writeline("tl.debug_barrier()")
    return _LOAD(kernel, name, index)
