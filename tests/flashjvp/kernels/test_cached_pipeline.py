"""The cache of launches of the warp-specialised kernels, whose arguments are descriptors."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashjvp import environment
from flashjvp.kernels.launch.call import FUSED, Call
from tests.flashjvp.kernels.stand_in import WIDTH, Kernel, WarpSpecialisedKernel, on_cpu, rows, statistic


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    environment.forget()
    yield
    environment.forget()


def run_pipeline(
    kernel: Kernel, x: Tensor, tile: tuple[int, ...] = (64, WIDTH), lse: Tensor | None = None, is_causal: bool = False,
    stages: int = 3, k: Tensor | None = None,
) -> None:  # fmt: skip
    lse = torch.empty(x.shape[:-1], device=x.device) if lse is None else lse
    k = x if k is None else k
    call = Call(x, k, k, None, is_causal)
    args = (SimpleNamespace(base=x, block_shape=list(tile)), lse)
    call.launch(kernel, "forward", 5, args, 0.5, STAGES=stages, JVP=True)


PIPELINES_DIFFER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype": ({"x": rows()}, {"x": rows(dtype=torch.float16)}),
    "device": ({"x": rows()}, {"x": on_cpu()}),
    "tile": ({"x": rows()}, {"x": rows(), "tile": (128, WIDTH)}),
    "constant": ({"x": rows()}, {"x": rows(), "stages": 4}),
    "causal": ({"x": rows()}, {"x": rows(), "is_causal": True}),
    "address of a statistic": ({"x": on_cpu(), "lse": statistic()}, {"x": on_cpu(), "lse": statistic(1)}),
    "dtype of a statistic": ({"x": on_cpu()}, {"x": on_cpu(), "lse": statistic(dtype=torch.float64)}),
    "heads of a group": ({"x": rows(heads=3)}, {"x": rows(heads=3), "k": rows(heads=1)}),
    "rows beyond 2^31": ({"x": rows(length=2**31 - 16, heads=3)}, {"x": rows(length=2**31, heads=3)}),
}


@pytest.mark.parametrize("name", PIPELINES_DIFFER)
def test_a_pipeline_compiles_anew_for_another(name: str) -> None:
    kernel = WarpSpecialisedKernel()
    first, second = PIPELINES_DIFFER[name]
    for _ in range(2):
        run_pipeline(kernel, **first)
        run_pipeline(kernel, **second)
    assert (len(kernel.compilations), len(kernel.launches)) == (2, 2)


def test_one_compiled_pipeline_serves_every_length_and_number_of_heads() -> None:
    kernel = WarpSpecialisedKernel()
    for length, heads in ((32, 3), (17, 3), (1, 3), (32, 1), (32, 16)):
        run_pipeline(kernel, rows(length, heads=heads))
    assert (len(kernel.compilations), len(kernel.launches)) == (1, 4)


def test_a_cached_pipeline_passes_the_present_arguments_in_the_kernels_order() -> None:
    kernel = WarpSpecialisedKernel()
    run_pipeline(kernel, rows(32))
    run_pipeline(kernel, rows(32))
    x, lse = rows(64), torch.empty(1, 2, 64, device="meta")
    run_pipeline(kernel, x, lse=lse)
    ((grid, compiled_with, options),), (_, given) = kernel.compilations, kernel.launches[-1]
    assert given[0].base is x and given[1] == lse.data_ptr()
    assert given[2:] == (0.5, 64, 64, 2, 1, True, False, 3)
    assert compiled_with[2:] == (0.5, 32, 32, 2, 1)
    assert options == {"JVP": True, "CAUSAL": False, "STAGES": 3, "num_warps": 4, **FUSED}
    assert grid == (5,) and kernel.launches[-1][0] == (5, 1, 1)


def test_a_constant_that_a_kernel_does_not_take_is_an_error() -> None:
    x = rows()
    with pytest.raises(TypeError, match="takes no REGISTER_OPERANDS"):
        Call(x, x, x, None, False).launch(
            WarpSpecialisedKernel(), "forward", 5, (None,), 0.5, JVP=True, STAGES=2, REGISTER_OPERANDS=1
        )
