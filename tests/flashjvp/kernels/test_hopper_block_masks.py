"""Block masks on the warp-specialised kernels, in an emulator of the GPU and, on one, compiled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.testing import assert_close

import flashjvp
from flashjvp.backends.patterns import Listed
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch.call import Call
from flashjvp.kernels.launch.hopper_tables import MEASURED_MASKS
from flashjvp.operands import Inputs
from tests.flashjvp.kernels.test_hopper import PLAIN, expected, interpreted, pipelines_in_use
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import tf32
from verify.emulator.gluon import emulated
from verify.oracles.attention import dense64, dense_same_type, run

CASES = (
    Case("gqa_64", batch=(2,), q_heads=2, kv_heads=1, m=300, n=420, d=64, dv=64),
    Case("plain_64", batch=(1,), q_heads=2, kv_heads=2, m=270, n=300, d=64, dv=64, **PLAIN),
    Case("few_72", batch=(1,), q_heads=2, kv_heads=2, m=60, n=300, d=72, dv=72),
    Case("long_72", batch=(1,), q_heads=2, kv_heads=1, m=400, n=270, d=72, dv=72),
    Case("square_96", batch=(1,), q_heads=2, kv_heads=2, m=256, n=256, d=96, dv=96),
    Case("ragged_128", batch=(1,), q_heads=2, kv_heads=1, m=300, n=260, d=128, dv=128),
    Case("plain_128", batch=(1,), q_heads=2, kv_heads=2, m=130, n=400, d=128, dv=128, **PLAIN),
    Case("one_row", batch=(), q_heads=2, kv_heads=2, m=1, n=1, d=64, dv=64),
)  # fmt: skip


def documents(case: Case) -> Callable[..., Tensor]:
    """Three of them, which end within blocks."""
    return lambda b, h, i, j: 3 * i // case.m == 3 * j // case.n


def causal(case: Case) -> Callable[..., Tensor]:
    """Also blocks that are visible as a whole."""
    return lambda b, h, i, j: j <= i


def sparse(case: Case) -> Callable[..., Tensor]:
    """Of each head other blocks: whole ones, scattered scores, none; empty rows and columns of blocks."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kind = (i // 128 + j // 128 + h) % 3
        scattered = (kind == 1) & ((7 * i + 13 * j) % 5 == 0)
        return ((kind == 0) | scattered) & (i // 128 != 1) & (j // 128 != 2)

    return seen


def quadrants(case: Case) -> Callable[..., Tensor]:
    """Halves of blocks that see nothing, of queries and of keys."""
    return lambda b, h, i, j: ((i // 64) % 2 != (j // 64 + h) % 2) & (j % 64 < 40)


def none(case: Case) -> Callable[..., Tensor]:
    return lambda b, h, i, j: j < 0


MASKS = (documents, causal, sparse, quadrants, none)


def judge(case: Case, mask: Callable[..., Any], dtype: torch.dtype, ordered: bool, device: str = "cpu") -> None:
    function, of = mask(case), (None, case.q_heads, case.m, case.n)
    inputs = make_inputs(case, dtype, device)
    explicit = replace(inputs, mask=create_mask(function, *of, device=device)[0])
    exact = dense64(explicit)
    budgets = budget(explicit, exact, dense_same_type(explicit))
    with pipelines_in_use(ordered) as launched:
        block_mask: Any = create_block_mask(function, *of, device=device)
        results = run(replace(inputs, mask=block_mask), "triton")
    assert set(launched) == {f"partial_{family}" for family in expected(inputs, ordered, False)}
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, mask: Callable[..., Any], ordered: bool) -> None:
    with emulated():
        judge(case, mask, torch.float16, ordered)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case, mask: Callable[..., Any], ordered: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, mask, dtype, ordered, "cuda")


def inputs_of(m: int, n: int) -> list[Tensor]:
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 1, rows, 64, generator=generator).half() for rows in (m, n, n) * 2]


@interpreted
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
def test_rows_that_nobody_sees_are_not_read(ordered: bool) -> None:
    """NaN in blocks of keys that no query sees, and of queries that see nothing."""
    m, n, seen = 400, 500, slice(128, 320)
    inputs = inputs_of(m, n)
    for x in inputs:
        x[..., :128, :], x[..., 384:, :] = torch.nan, torch.nan
    block_mask = create_block_mask(
        lambda b, h, i, j: (i >= 128) & (i < 320) & (j >= 128) & (j < 320), None, None, m, n, device="cpu"
    )
    leaves = [x.requires_grad_() for x in inputs]
    with emulated(), pipelines_in_use(ordered) as launched:
        outputs = flashjvp.attention_jvp(*leaves, block_mask, backend="triton")
        grads = torch.autograd.grad([x.float().sum() for x in outputs], leaves)
    assert launched
    for x in (*outputs, *grads):
        assert x[..., seen, :].ne(0).any() and x.isfinite().all()
        assert x[..., :128, :].eq(0).all() and x[..., 384:, :].eq(0).all()


@interpreted
def test_keys_beyond_the_end_of_a_full_block() -> None:
    """Blocks of the mask are full up to the last key, which ends within a block of the plan."""
    inputs = inputs_of(192, 320)
    block_mask = create_block_mask(lambda b, h, i, j: j >= 0, None, None, 192, 320, device="cpu", BLOCK_SIZE=64)
    with emulated(), pipelines_in_use(True):
        results = [flashjvp.attention_jvp(*inputs, mask, backend="triton") for mask in (block_mask, None)]
    assert_close(*results)


@interpreted
def test_what_other_kernels_serve() -> None:
    """Dropout, and float32 in TF32."""
    inputs = inputs_of(140, 150)
    block_mask = create_block_mask(causal(CASES[0]), None, None, 140, 150, device="cpu")
    with emulated(), pipelines_in_use(True) as launched:
        flashjvp.attention_jvp(*inputs, block_mask, backend="triton")
        assert launched == ["partial_forward"]
        flashjvp.attention_jvp(*inputs, block_mask, dropout_p=0.5, backend="triton")
        with tf32():
            flashjvp.attention_jvp(*[x.float() for x in inputs], block_mask, backend="triton")
    assert launched == ["partial_forward"]


def test_a_triton_that_block_masks_were_not_measured_with(machine: Callable[..., None]) -> None:
    inputs = Inputs(*[x.to("meta") for x in inputs_of(140, 150)])
    call = Call(
        inputs.q, inputs.k, inputs.v, torch.empty(100, dtype=torch.int32, device="meta"), False, pattern=Listed()
    )
    call.device = torch.device("cuda", 0)  # which no kernel is launched on
    newest = max(MEASURED_MASKS)
    for release, is_served in ((newest, True), ((newest[0], newest[1] + 1), False)):
        machine(triton_release=release)
        assert (eligibility.unmeasured(call) is None) == is_served
