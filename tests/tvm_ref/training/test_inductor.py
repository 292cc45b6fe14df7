"""Generated kernels get a barrier before they read back what they stored. Seeing the race needs a GPU."""

from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._inductor.codegen.common import CSE
from torch._inductor.codegen.triton import TritonKernel

from tvm_ref.training import inductor
from tvm_ref.training.parallel import compile_blocks


def written_before_a_load(name: str, stored: set[str]) -> list[str]:
    """What the guarded load writes into a kernel whose earlier loops stored these names."""
    lines: list[str] = []
    kernel = SimpleNamespace(
        cse=SimpleNamespace(invalidated_stores=stored), loads=SimpleNamespace(writeline=lines.append)
    )
    with patch.object(inductor, "_LOAD", lambda kernel, name, index: lines.append(f"load {name}[{index}]")):
        TritonKernel.load(kernel, name, 3)
    return lines


def test_compiled_blocks_wait_before_they_read_back_what_they_stored() -> None:
    with patch.object(TritonKernel, "load", TritonKernel.load):
        for _ in range(2):  # once more changes nothing
            compile_blocks(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
            assert written_before_a_load("buf0", {"buf0"}) == ["tl.debug_barrier()", "load buf0[3]"]
            assert written_before_a_load("buf1", {"buf0"}) == ["load buf1[3]"]


def test_inductor_knows_what_earlier_loops_stored() -> None:
    assert CSE().invalidated_stores == set()
