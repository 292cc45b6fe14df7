"""Every backend gives the exact results, within the error budget, on every case of the feature matrix.

Fresh memory is NaN (conftest.py). Without a GPU the triton backend runs in Triton's interpreter, on CPU tensors; tests
marked gpu run the compiled kernels.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashjvp.backends import select
from verify.budget.tolerance import Budgets, assert_within, budget, check
from verify.cases.case import Case
from verify.cases.catalogue import CASES
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import NAMES, Backend, Results, dense64, dense_same_type, run

BY_NAME = {case.name: case for case in CASES}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# In the interpreter float16 differs from float32 by the conversions alone, and bfloat16 products are wrong.
INTERPRETED_FLOAT16 = (
    "square", "plain", "dims_72_72", "dims_1_33", "lengths_1_1", "lengths_33_257", "causal_33_80",
    "mask_bool_full", "mask_bool_empty_rows", "mask_additive_full", "mask_additive_float32_matrix", "mqa_causal",
    "batch_empty", "packed_plain", "layout_padded", "cotangent_o_t_tangents_v", "scores_1e4_causal",
    "large_mu_causal", "one_hot_causal", "constant_keys_causal", "zeros_odd",
)  # fmt: skip
STRUCTURES = ("square", "packed_causal_padded_tangents", "mask_bool_empty_rows", "gqa")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")

OF_KERNELS = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.m * case.n > 2**19 else [])
    for case in CASES
    if max(case.d, case.dv) <= select.MAX_HEAD_DIM
]


def dtype_id(value: object) -> str | None:
    return str(value)[6:] if isinstance(value, torch.dtype) else None


@functools.cache
def judged(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Inputs, Results, Budgets]:
    inputs = make_inputs(case, dtype, device)
    exact = dense64(inputs)
    return inputs, exact, budget(inputs, exact, dense_same_type(inputs))


def judge(case: Case, dtype: torch.dtype, backend: Backend, device: str = "cpu") -> None:
    """The backend's results keep the budget, have the type of the inputs, and the inputs are not written to."""
    inputs, exact, budgets = judged(case, dtype, device)
    before = inputs.map(torch.clone)
    results = run(inputs, backend)
    failed = [row for row in check(results, exact, budgets) if not row.ok]
    assert not failed
    for name in NAMES:
        value = getattr(results, name)
        assert (value is None) == (getattr(exact, name) is None)
        assert value is None or value.dtype == dtype
    assert equal_inputs(inputs, before)


def equal_inputs(a: Inputs, b: Inputs) -> bool:
    return all(torch.equal(x, getattr(b, name)) for name, x in vars(a).items() if isinstance(x, torch.Tensor))


def bit_equal(a: Results, b: Results) -> bool:
    return all((x := getattr(a, name)) is None or torch.equal(x, getattr(b, name)) for name in NAMES)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ("reference", "tiled"))
def test_torch_backends(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype, backend)


@interpreted
@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("case", OF_KERNELS)
def test_triton_interpreted(case: Case) -> None:
    judge(case, torch.float32, "triton")


@interpreted
@pytest.mark.parametrize("name", INTERPRETED_FLOAT16)
def test_triton_interpreted_float16(name: str) -> None:
    judge(BY_NAME[name], torch.float16, "triton")


@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("backend", ("reference", "tiled", pytest.param("triton", marks=interpreted)))
def test_two_runs_are_bit_identical(backend: Backend, name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float32)
    assert bit_equal(run(inputs, backend), run(inputs, backend))


class NoCopies(TorchDispatchMode):
    """Fails on the operators behind `contiguous`, `clone` and `to` (the interpreter itself uses `copy_`)."""

    COPIES = (torch.ops.aten.clone, torch.ops.aten._to_copy)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket not in self.COPIES, f"{func} copies a tensor"
        return func(*args, **(kwargs or {}))


def call_kernels(inputs: Inputs) -> None:
    """The kernels' launchers on the inputs as they are, without the dispatcher between."""
    from flashjvp.backends import triton as kernels

    primals = (inputs.q, inputs.k, inputs.v)
    tangents = (inputs.q_t, inputs.k_t, inputs.v_t)
    options = (inputs.mask, None, None, inputs.is_causal, inputs.c, 0.0)
    o, o_t, lse, mu = kernels.forward_jvp(*primals, *tangents, *options)
    wanted = (True,) * 6 + (False,) * 2
    kernels.backward_jvp(inputs.d_o, inputs.d_o_t, *primals, *tangents, o, o_t, lse, mu, *options, wanted)


@interpreted
@pytest.mark.parametrize(
    "name", ("packed", "packed_causal_padded_tangents", "layout_sequence_major", "layout_expanded", "mask_bool_per_key")
)
def test_kernels_read_views_without_copies(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float32)
    with NoCopies():
        call_kernels(inputs)


@interpreted
def test_the_copy_detector_sees_the_one_documented_copy() -> None:
    inputs = make_inputs(BY_NAME["layout_column_major"], torch.float32)
    with pytest.raises(AssertionError, match="copies a tensor"), NoCopies():
        call_kernels(inputs)


GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGE = (
    Case("large_1024", batch=(2,), q_heads=4, kv_heads=4, m=1024, n=1024, d=72, dv=72, layout="packed"),
    Case("large_4096", batch=(1,), q_heads=2, kv_heads=1, m=4096, n=4096, d=128, dv=128, layout="sequence_major"),
    Case("large_causal", batch=(1,), q_heads=2, kv_heads=2, m=2048, n=2048, d=64, dv=64, is_causal=True),
    Case("large_wide", batch=(1,), q_heads=2, kv_heads=2, m=1000, n=4095, d=256, dv=256),
    Case("large_mask", batch=(1,), q_heads=2, kv_heads=2, m=1023, n=2049, mask="bool", mask_shape="per_key"),
    Case("large_additive", batch=(1,), q_heads=2, kv_heads=2, m=2048, n=1024, d=96, dv=40, mask="additive"),
    Case("large_mu_4096", batch=(1,), q_heads=1, kv_heads=1, m=1024, n=4096, d=64, dv=64, kind="large_mu"),
    Case("large_plain", batch=(1,), q_heads=2, kv_heads=2, m=4096, n=4096, d=64, dv=64, tangents=(), cotangents=("o",)),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", OF_KERNELS)
def test_triton_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("name", STRUCTURES)
def test_tiled_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    judge(BY_NAME[name], dtype, "tiled", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    """The last batch element and key head keep the budget, and a second run is bit-identical."""
    inputs = make_inputs(case, dtype, "cuda")
    results = run(inputs, "triton")
    last = (tuple(size - 1 for size in case.batch), case.kv_heads - 1)
    assert_within(inputs.group(*last), results.group(*last))
    assert bit_equal(results, run(inputs, "triton"))


@pytest.fixture
def free_gpu_memory() -> Iterator[Callable[[float], None]]:
    """Skips the test unless so many GiB are free on the GPU."""
    torch.cuda.empty_cache()

    def need(gib: float) -> None:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, {free:.0f} GiB are free")

    yield need
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_a_gpu(free_gpu_memory: Callable[[float], None]) -> None:
    """q, k, v, tangents, outputs and gradients of 2^31 + 2^20 elements each; first and last head are judged."""
    free_gpu_memory(100.0)
    case = Case("beyond_2_31", batch=(2049,), q_heads=256, kv_heads=256, m=64, n=64, d=64, dv=64)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    assert inputs.q.numel() > 2**31
    results = run(inputs, "triton")
    for group in (((0,), 0), ((2048,), 255)):
        assert_within(inputs.group(*group), results.group(*group))


@pytest.mark.gpu
def test_row_offsets_beyond_2_to_the_31_on_a_gpu(free_gpu_memory: Callable[[float], None]) -> None:
    """Rows so far apart that the last ones of a single head lie beyond element 2^31."""
    free_gpu_memory(16.0)
    rows, stride = 1024, 2**21 + 4096
    memory = torch.empty(rows * stride, dtype=torch.bfloat16, device="cuda")
    compact = make_inputs(Case("far_rows", batch=(), q_heads=1, kv_heads=1, m=rows, n=rows), torch.bfloat16, "cuda")
    starts = iter(range(0, 8 * 64, 64))

    def spread(x: torch.Tensor) -> torch.Tensor:
        return memory.as_strided(x.shape, (rows * stride, stride, 1), next(starts)).copy_(x)

    inputs = compact.map(spread)
    assert (rows - 1) * inputs.q.stride(-2) > 2**31
    assert_within(compact, run(inputs, "triton"))


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    inputs = make_inputs(BY_NAME["mask_bool_empty_rows"], torch.bfloat16, "cuda")
    run(inputs, "triton")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_a_gpu_call_without_a_backend_takes_the_kernels() -> None:
    inputs = make_inputs(BY_NAME["square"], torch.bfloat16, "cuda")
    assert bit_equal(run(inputs), run(inputs, "triton"))
