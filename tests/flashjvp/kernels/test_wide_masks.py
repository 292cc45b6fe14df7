"""The wide kernels, of head dims above 128, beside boolean and additive masks."""

from unittest.mock import patch

import pytest
import torch

import flashjvp
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.hopper_tables import PIPELINES
from tests.flashjvp.kernels.test_hopper import interpreted
from tests.flashjvp.kernels.test_wide import ALL, ONE, judge
from verify.cases.case import Case, MaskShape
from verify.emulator.gluon import emulated

BOOLEAN = (
    Case("bool_160", batch=(2,), q_heads=2, kv_heads=2, m=70, n=150, d=160, dv=160, mask="bool"),
    Case("bool_192", **ONE, m=200, n=140, d=192, dv=192, mask="bool"),
    Case("bool_256", batch=(), q_heads=2, kv_heads=1, m=70, n=300, d=256, dv=256, mask="bool"),
    Case("bool_aligned_256", batch=(2,), q_heads=1, kv_heads=1, m=64, n=256, d=200, dv=200, mask="bool",
         mask_shape="matrix"),
    Case("bool_causal_160", **ONE, m=150, n=100, d=144, dv=144, mask="bool", is_causal=True),
    Case("bool_causal_gqa_192", batch=(1,), q_heads=4, kv_heads=2, m=90, n=140, d=192, dv=192, mask="bool",
         is_causal=True),
    Case("bool_causal_256", **ONE, m=140, n=150, d=256, dv=256, mask="bool", is_causal=True),
    Case("bool_empty_rows_160", **ONE, m=70, n=80, d=160, dv=160, mask="bool", mask_shape="empty_rows"),
    Case("bool_empty_rows_192", batch=(2,), q_heads=1, kv_heads=1, m=140, n=150, d=192, dv=192, mask="bool",
         mask_shape="empty_rows"),
    Case("bool_empty_rows_causal_256", **ONE, m=70, n=90, d=256, dv=256, mask="bool", mask_shape="empty_rows",
         is_causal=True),
    Case("bool_per_key_192", batch=(2,), q_heads=2, kv_heads=1, m=140, n=200, d=192, dv=192, mask="bool",
         mask_shape="per_key"),
    Case("bool_per_row_256", batch=(2,), q_heads=1, kv_heads=1, m=140, n=70, d=256, dv=256, mask="bool",
         mask_shape="per_row"),
    Case("bool_per_head_160", batch=(2,), q_heads=4, kv_heads=2, m=70, n=90, d=160, dv=160, mask="bool",
         mask_shape="per_head"),
    Case("bool_per_batch_256", batch=(2,), q_heads=2, kv_heads=1, m=20, n=200, d=256, dv=256, mask="bool",
         mask_shape="per_batch"),
    Case("bool_q_t_alone_192", **ONE, m=70, n=90, d=192, dv=192, mask="bool", tangents=("q",), cotangents=("o_t",)),
    Case("bool_low_scores_192", **ONE, m=70, n=150, d=192, dv=192, mask="bool", kind="low_scores"),
    Case("bool_scores_1e4_256", **ONE, m=70, n=90, d=256, dv=256, mask="bool", mask_shape="empty_rows", magnitude=1e4),
)  # fmt: skip
ADDITIVE = (
    Case("additive_160", batch=(2,), q_heads=2, kv_heads=2, m=70, n=150, d=160, dv=160, mask="additive"),
    Case("additive_192", **ONE, m=200, n=140, d=192, dv=192, mask="additive"),
    Case("additive_256", batch=(), q_heads=2, kv_heads=1, m=70, n=300, d=256, dv=256, mask="additive"),
    Case("additive_float32_160", **ONE, m=140, n=90, d=144, dv=144, mask="additive_float32"),
    Case("additive_float32_aligned_192", batch=(2,), q_heads=4, kv_heads=2, m=70, n=80, d=192, dv=192,
         mask="additive_float32", mask_shape="per_head"),
    Case("additive_causal_192", **ONE, m=140, n=100, d=192, dv=192, mask="additive", mask_shape="matrix",
         is_causal=True),
    Case("additive_causal_gqa_256", batch=(2,), q_heads=2, kv_heads=1, m=70, n=144, d=256, dv=256, mask="additive",
         mask_shape="matrix", is_causal=True),
    Case("additive_empty_rows_160", **ONE, m=70, n=80, d=160, dv=160, mask="additive", mask_shape="empty_rows"),
    Case("additive_empty_rows_192", batch=(2,), q_heads=1, kv_heads=1, m=140, n=150, d=192, dv=192, mask="additive",
         mask_shape="empty_rows"),
    Case("additive_empty_rows_causal_256", **ONE, m=70, n=90, d=256, dv=256, mask="additive",
         mask_shape="empty_rows", is_causal=True),
    Case("additive_per_key_160", batch=(2,), q_heads=2, kv_heads=1, m=140, n=200, d=160, dv=160, mask="additive",
         mask_shape="per_key"),
    Case("additive_per_batch_192", batch=(2,), q_heads=2, kv_heads=1, m=70, n=90, d=192, dv=192, mask="additive",
         mask_shape="per_batch"),
    Case("additive_cotangent_o_t_256", **ONE, m=70, n=90, d=256, dv=256, mask="additive", cotangents=("o_t",)),
)  # fmt: skip
CASES = BOOLEAN + ADDITIVE


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, dtype: torch.dtype) -> None:
    with emulated():
        judge(case, dtype, ALL)


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("case", [case for case in BOOLEAN if case.magnitude == 1], ids=str)
def test_scores_whose_maximum_is_scaled_first(case: Case) -> None:
    """As bfloat16 is computed, which the interpreter of the other kernels does not serve."""
    with emulated():
        from flashjvp.kernels.hopper import forward

        with patch.object(forward, "_subtracts_first", lambda dtype: False):
            judge(case, torch.float32, ALL)


@interpreted
@pytest.mark.parametrize("mask_shape", ["per_row", "full"])
def test_a_mask_of_one_key_for_all_takes_the_portable_kernels(mask_shape: MaskShape) -> None:
    case = Case("one_key", **ONE, m=64, n=70, d=192, dv=192, mask="additive", mask_shape=mask_shape)
    with emulated():
        judge(case, torch.float16, set() if mask_shape == "per_row" else ALL)


@pytest.mark.parametrize("mask", [torch.bool, torch.bfloat16, torch.float32], ids=["boolean", "bfloat16", "float32"])
def test_explain(mask: torch.dtype) -> None:
    q, k, v, q_t = (torch.empty(1, 2, 100, 160, device="meta", dtype=torch.bfloat16) for _ in range(4))
    attn_mask = torch.empty(100, 100, device="meta", dtype=mask)
    with replaced.pipelines(PIPELINES["sm_90"]):
        found = flashjvp.explain(q, k, v, q_t=q_t, attn_mask=attn_mask, backend="triton")
    assert found.kernels == "warp-specialised"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, dtype, ALL, "cuda")
