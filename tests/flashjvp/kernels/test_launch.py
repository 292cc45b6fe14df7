"""The cache of launches: what makes Triton compile anew, what does not, and what a launch from the cache passes."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashjvp import environment
from flashjvp.backends.high import HALF
from flashjvp.kernels.hopper.descriptors import rows_descriptors
from flashjvp.kernels.launch import schedule
from flashjvp.kernels.launch.argument import argument
from flashjvp.kernels.launch.call import Call
from flashjvp.kernels.tiles import Operand, odd
from tests.flashjvp.kernels.stand_in import WIDTH, Kernel, on_cpu, rows, statistic


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    environment.forget()
    yield
    environment.forget()


def run(
    kernel: Kernel, x: Tensor, k: Tensor | None = None, q_t: Tensor | None = None, k_t: Tensor | None = None,
    mask: Tensor | None = None, lse: Tensor | None = None, is_causal: bool = False, scale: float = 1.0,
    tile: schedule.Tile | None = None,
) -> None:  # fmt: skip
    """A launch on queries `x` and, by default, as many keys and values like them."""
    k = x if k is None else k
    lse = torch.empty(x.shape[:-1], device=x.device) if lse is None else lse
    call = Call(x, k, k, mask, is_causal)
    args = (*call.operands(x, k, q_t, k_t), call.mask, lse)
    tile = tile or call.tile("forward")
    call.launch(
        kernel, "forward", call.query_programs(tile.block_m), args, scale, warps=tile.warps, stages=tile.stages,
        TILE=tile.block,
    )  # fmt: skip


def is_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


FULL = (1, 1, 32, 32)
# Two launches that Triton must compile for one by one. They differ in what the name says, as nearly as can be alone.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "address of an operand": ({"x": on_cpu()}, {"x": on_cpu(1)}),
    "address of a statistic": ({"x": on_cpu(), "lse": statistic()}, {"x": on_cpu(), "lse": statistic(1)}),
    "address of a mask": (
        {"x": on_cpu(), "mask": torch.empty(64, dtype=torch.bool)[None, None, None, :32]},
        {"x": on_cpu(), "mask": torch.empty(64, dtype=torch.bool)[None, None, None, 1:33]},
    ),
    "row stride beyond 2^31": ({"x": rows(length=1, row=2**28)}, {"x": rows(length=1, row=2**31 + 8)}),
    "head stride beyond 2^31": ({"x": rows(row=2**20)}, {"x": rows(length=2**11, row=2**20)}),
    "some stride not in steps of 16 bytes": ({"x": rows(row=72)}, {"x": rows(row=73)}),
    "rows too far apart for 32 bits": ({"x": rows(row=2**23 - 16)}, {"x": rows(row=2**23)}),
    "dtype of the operands": ({"x": rows()}, {"x": rows(dtype=torch.float16)}),
    "dtype of one operand": ({"x": rows(), "q_t": rows()}, {"x": rows(), "q_t": rows(dtype=torch.float16)}),
    "dtype of a statistic": ({"x": on_cpu()}, {"x": on_cpu(), "lse": statistic(dtype=torch.float64)}),
    "operand more": ({"x": rows()}, {"x": rows(), "q_t": rows()}),
    "operand missing": ({"x": rows(), "q_t": rows()}, {"x": rows(), "k_t": rows()}),
    "rows beyond 2^31": ({"x": rows(length=2**31 - 1, heads=1)}, {"x": rows(length=2**31, heads=1)}),
    "keys beyond 2^31": (
        {"x": rows(heads=1), "k": rows(length=2**31 - 1, heads=1)},
        {"x": rows(heads=1), "k": rows(length=2**31, heads=1)},
    ),
    "batch beyond 2^30": ({"x": rows(batch=2**29)}, {"x": rows(batch=2**30)}),
    "number of batch dims": ({"x": rows()[0]}, {"x": rows()[None].expand(2, 1, -1, -1, -1)}),
    "heads of a group": ({"x": rows(heads=4), "k": rows(heads=4)}, {"x": rows(heads=4), "k": rows(heads=2)}),
    "device": ({"x": on_cpu()}, {"x": rows()}),
    "head dim": ({"x": rows(width=64)}, {"x": rows(width=48, row=64)}),
    "causal": ({"x": rows()}, {"x": rows(), "is_causal": True}),
    "a mask": ({"x": rows()}, {"x": rows(), "mask": rows(1, 1, 32)}),
    "type of a mask": (
        {"x": rows(), "mask": torch.empty(FULL, device="meta")},
        {"x": rows(), "mask": torch.empty(FULL, device="meta", dtype=torch.bool)},
    ),
    "a mask for all keys alike": (
        {"x": rows(), "mask": torch.empty(FULL, device="meta")},
        {"x": rows(), "mask": torch.empty(1, 1, 32, 1, device="meta")},
    ),
    "keys that an aligned mask cannot be read for": (
        {"x": rows(), "mask": torch.empty(FULL, device="meta")},
        {"x": rows(), "k": rows(40), "mask": torch.empty(1, 1, 1, 48, device="meta")[..., :40]},
    ),
}  # fmt: skip
# Two launches that one compilation serves.
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "address of one operand beside others that are not aligned": (
        {"x": on_cpu(1), "q_t": on_cpu(), "k": on_cpu()},
        {"x": on_cpu(1), "q_t": on_cpu(1), "k": on_cpu()},
    ),
    "address of a mask that is read number by number": (
        {"x": on_cpu(), "k": on_cpu()[:, :, :31], "mask": torch.empty(32, dtype=torch.bool)[None, None, None, :31]},
        {"x": on_cpu(), "k": on_cpu()[:, :, :31], "mask": torch.empty(32, dtype=torch.bool)[None, None, None, 1:]},
    ),
    "row stride a multiple of 16, or of 8": ({"x": rows(row=80)}, {"x": rows(row=72)}),
    "row stride of 1": ({"x": rows(width=1)}, {"x": rows(width=1, row=3)}),
    "row stride of a head dim that 16 does not divide": ({"x": rows(width=72)}, {"x": rows(width=72, row=16 * 72)}),
    "another number of heads in a group": (
        {"x": rows(heads=16), "k": rows(heads=8)}, {"x": rows(heads=16), "k": rows(heads=1)}
    ),
    "the same tensors": ({"x": rows()}, {"x": rows()}),
    "another sequence length": ({"x": rows(32)}, {"x": rows(1000)}),
    "one row": ({"x": rows(32)}, {"x": rows(1)}),
    "an odd sequence length": ({"x": rows(32), "k": rows(64)}, {"x": rows(31), "k": rows(17)}),
    "another number of heads": ({"x": rows(heads=2)}, {"x": rows(heads=16)}),
    "another batch size": ({"x": rows(batch=1)}, {"x": rows(batch=16)}),
    "another scale": ({"x": rows(), "scale": 0.5}, {"x": rows(), "scale": 1.0}),
    "another row stride of its kind": ({"x": rows(row=64)}, {"x": rows(row=192)}),
    "another aligned address": ({"x": on_cpu()}, {"x": on_cpu(8)}),
    "another misaligned address": ({"x": on_cpu(1)}, {"x": on_cpu(2)}),
    "masks of other lengths": (
        {"x": rows(32), "mask": torch.empty(FULL, device="meta")},
        {"x": rows(64), "mask": torch.empty(1, 1, 64, 64, device="meta")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_compiles_anew_for_another(name: str) -> None:
    kernel = Kernel()
    first, second = DIFFERENT[name]
    for _ in range(2):
        run(kernel, **first)
        run(kernel, **second)
    assert (len(kernel.compilations), len(kernel.launches)) == (2, 2)


@pytest.mark.parametrize("name", ALIKE)
def test_one_compilation_serves(name: str) -> None:
    kernel = Kernel()
    first, second = ALIKE[name]
    run(kernel, **first)
    run(kernel, **second)
    assert (len(kernel.compilations), len(kernel.launches)) == (1, 1)


def test_compiles_anew_for_another_precision_of_products(precision: None) -> None:
    """Also where tile and chunks of columns are the same."""
    kernel = Kernel()
    for on in (True, False):
        is_tf32(on)
        run(kernel, rows(dtype=torch.float32, width=32), tile=schedule.Tile(32, 32, 4, 1))
    assert len(kernel.compilations) == 2


def test_compiles_anew_for_another_tile() -> None:
    kernel = Kernel()
    for stages in (1, 7):
        run(kernel, rows(), tile=schedule.Tile(32, 32, 4, stages))
    assert [options["num_stages"] == 7 for *_, options in kernel.compilations] == [False, True]


def test_compiles_every_kernel() -> None:
    one, other = Kernel(), Kernel()
    run(one, rows())
    run(other, rows())
    assert len(one.compilations) == len(other.compilations) == 1


def test_what_compiles_to_nothing_is_run_every_time() -> None:
    """The interpreter returns no compiled kernel."""
    kernel = Kernel(compiles=False)
    run(kernel, rows())
    run(kernel, rows())
    assert len(kernel.compilations) == 2


def test_a_cached_launch_passes_the_present_addresses_sizes_and_scale() -> None:
    kernel = Kernel()
    (x, lse), (y, other_lse) = (on_cpu(), statistic()), (on_cpu(8), statistic(4))
    run(kernel, x, lse=lse, scale=0.25)
    run(kernel, x, lse=lse, scale=0.25)
    run(kernel, y, y[:, :, :16], lse=other_lse, scale=0.5)
    (_, compiled_with, _), (_, given) = kernel.compilations[0], kernel.launches[-1]
    strides = (WIDTH, odd(32 * WIDTH), odd(2 * 32 * WIDTH))
    assert compiled_with[:6] == (Operand(x, strides), Operand(x, strides), None, None, None, lse)
    assert compiled_with[0].ptr is x and compiled_with[5] is lse
    assert given[:6] == ((y.data_ptr(), strides), (y.data_ptr(), strides), None, None, None, other_lse.data_ptr())
    assert compiled_with[6:12] == (0.25, (odd(1),), 32, 32, 2, 1)
    assert given[6:12] == (0.5, (odd(1),), 32, 16, 2, 1)
    assert given[12:] == tuple(kernel.compilations[0][2][name] for name in kernel.constants)


@pytest.mark.parametrize("x", [on_cpu(), rows(row=72), on_cpu(8)], ids=["contiguous", "padded", "moved"])
def test_aligned_rows_are_told_to_the_kernel(x: Tensor) -> None:
    assert is_regular(x) is True


@pytest.mark.parametrize(
    "x", [on_cpu(1), rows(row=73), rows(row=2**23)], ids=["address", "stride", "too far apart for 32 bits"]
)
def test_other_rows_are_never_taken_for_aligned_ones(x: Tensor) -> None:
    assert is_regular(x) is False


def is_regular(x: Tensor) -> object:
    """The constant REGULAR of a kernel."""
    kernel = Kernel()
    run(kernel, x, lse=torch.empty(x.shape[:-1], device=x.device))
    return kernel.compilations[0][2]["REGULAR"]


def test_the_grid_follows_the_sizes() -> None:
    kernel = Kernel()
    for x in (rows(1), rows(1), rows(4096, heads=3, batch=5)):
        run(kernel, x)
    block = schedule.lookup(torch.device("meta"), "half", "forward", WIDTH).block_m
    assert kernel.launches[0][0] == (2, 1, 1)
    assert kernel.launches[1][0] == (5 * 3 * (4096 // block), 1, 1)


def test_an_operand_with_strided_columns_is_copied_once_a_call() -> None:
    x = on_cpu().mT.contiguous().mT
    call = Call(x, x, x, None, False)
    (first,), (again,) = call.operands(x), call.operands(x)
    assert first is not None and first is again
    copied, _, _ = first
    assert copied.is_contiguous() and copied.data_ptr() != x.data_ptr()


def test_the_cache_keeps_no_tensor_alive() -> None:
    kernel = Kernel()
    x = on_cpu()
    died = weakref.ref(x)
    run(kernel, x)
    run(kernel, x)
    kernel.compilations.clear()
    del x
    gc.collect()
    assert died() is None


def test_a_descriptor_of_another_type_makes_another_kernel() -> None:
    """As of gradients in bfloat16 and in float16 that come from the same float16 copies."""
    found = {argument(rows_descriptors(rows().to(dtype)[..., :16], 16, (16,))[0])[2] for dtype in HALF}
    assert len(found) == len(HALF)
