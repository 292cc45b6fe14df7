"""The wide kernels, of head dims above 128, give the exact results, in the emulator and, on a GPU, compiled."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

import flashjvp
from flashjvp.kernels.launch import hopper_tables, replaced
from flashjvp.kernels.launch.hopper_tables import PIPELINES, Pipeline
from flashjvp.kernels.launch.schedule import padded_width, pipeline_chunks
from tests.flashjvp.kernels.test_hopper import interpreted, pipelines_in_use
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.emulator.gluon import emulated
from verify.emulator.machine import EmulationError
from verify.oracles.attention import dense64, dense_same_type, run

ONE: dict[str, Any] = {"batch": (1,), "q_heads": 1, "kv_heads": 1}
ALL = {"forward", "backward_key", "backward_value", "backward_query"}
CASES = (
    Case("one_row", **ONE, m=1, n=1, d=136, dv=136),
    Case("square_160", **ONE, m=128, n=128, d=160, dv=160),
    Case("ragged_160", batch=(2,), m=70, n=150, d=144, dv=144),
    Case("gqa_causal_160", batch=(1,), q_heads=4, kv_heads=2, m=100, n=130, d=160, dv=160, is_causal=True),
    Case("ragged_192", batch=(1,), m=100, n=210, d=192, dv=192),
    Case("causal_more_keys_192", **ONE, m=60, n=300, d=192, dv=192, is_causal=True),
    Case("causal_more_queries_192", **ONE, m=300, n=60, d=176, dv=176, is_causal=True),
    Case("mqa_192", batch=(1,), q_heads=3, kv_heads=1, m=70, n=90, d=192, dv=192, layout="sequence_major"),
    Case("ragged_256", batch=(), q_heads=2, kv_heads=2, m=90, n=150, d=256, dv=256),
    Case("gqa_causal_256", batch=(2,), q_heads=2, kv_heads=1, m=150, n=100, d=256, dv=256, is_causal=True),
    Case("padded_200", batch=(2,), m=70, n=70, d=200, dv=200, layout="packed"),
    Case("values_wider", **ONE, m=70, n=90, d=64, dv=192),
    Case("values_narrower", **ONE, m=70, n=90, d=256, dv=40),
    Case("q_t_alone", **ONE, m=70, n=90, d=192, dv=192, tangents=("q",)),
    Case("k_t_and_v_t", **ONE, m=70, n=90, d=160, dv=160, tangents=("k", "v"), scale=0.3),
    Case("cotangent_o_t", **ONE, m=70, n=90, d=256, dv=256, cotangents=("o_t",)),
    Case("low_scores", **ONE, m=64, n=200, d=192, dv=192, kind="low_scores"),
    Case("large_mu", **ONE, m=64, n=200, d=192, dv=192, kind="large_mu"),
    Case("one_hot", **ONE, m=70, n=300, d=256, dv=256, kind="one_hot"),
    Case("constant_keys", **ONE, m=64, n=80, d=160, dv=160, kind="constant_keys"),
    Case("scores_1e4", **ONE, m=64, n=150, d=192, dv=192, magnitude=1e4),
)  # fmt: skip
PORTABLE = (
    Case("plain", **ONE, m=64, n=70, d=256, dv=256, tangents=(), cotangents=("o",)),
    Case("v_t_alone", **ONE, m=64, n=70, d=160, dv=160, tangents=("v",)),
)


def judge(case: Case, dtype: torch.dtype, families: set[str], device: str = "cpu") -> None:
    inputs = make_inputs(case, dtype, device)
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense_same_type(inputs))
    with pipelines_in_use(ordered=False) as launched:
        results = run(inputs, "triton")
    assert set(launched) == families
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, dtype: torch.dtype) -> None:
    with emulated():
        judge(case, dtype, ALL)


@interpreted
@pytest.mark.sampled(of=20)
@pytest.mark.parametrize("threshold", [1.0, 0.5], ids=["threshold as it is", "a threshold that scores pass"])
@pytest.mark.parametrize("case", [case for case in CASES if case.magnitude == 1], ids=str)
def test_scores_whose_maximum_is_scaled_first(case: Case, threshold: float) -> None:
    """As bfloat16 is computed, which the interpreter of the other kernels does not serve."""
    with emulated():
        from flashjvp.kernels.hopper import forward

        with (
            patch.object(forward, "_subtracts_first", lambda dtype: False),
            patch.object(forward, "RESCALE_THRESHOLD", threshold),
        ):
            judge(case, torch.float32, ALL)


@interpreted
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_number_of_stages(stages: int) -> None:
    case = Case("stages", **ONE, m=70, n=200, d=192, dv=192)
    tiles = {192: {"tangents": dict.fromkeys(ALL, Pipeline(32, stages))}}
    with emulated(), patch.dict(PIPELINES["sm_90"], tiles):
        judge(case, torch.float16, ALL)


@interpreted
@pytest.mark.parametrize("case", PORTABLE, ids=str)
def test_other_calls_take_the_portable_kernels(case: Case) -> None:
    with emulated():
        judge(case, torch.float32, set())


@interpreted
def test_a_backward_of_o_alone_takes_the_portable_kernels() -> None:
    """It has no products with tangents."""
    with emulated():
        judge(Case("cotangent_o", **ONE, m=70, n=90, d=192, dv=192, cotangents=("o",)), torch.float16, {"forward"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": (10, 0)}, "a window at head dims above 128"),
        ({"q_t": None}, "no tangents"),
    ],
    ids=["window", "plain"],
)
def test_what_keeps_them_off_is_named(change: dict[str, Any], words: str) -> None:
    q, k, v, q_t = (torch.empty(1, 2, 100, 160, device="meta", dtype=torch.bfloat16) for _ in range(4))
    with replaced.pipelines(PIPELINES["sm_90"]):
        assert flashjvp.explain(q, k, v, q_t=q_t, backend="triton").kernels == "warp-specialised"
        found = flashjvp.explain(q, k, v, **{"q_t": q_t, "backend": "triton", **change})
    assert found.kernels == "portable"
    assert words in " ".join(found.why_not_faster)


@interpreted
@pytest.mark.parametrize("what", ["what is given read too early", "a tile freed too early"])
def test_the_emulator_sees(what: str) -> None:
    with emulated():
        from flashjvp.kernels.hopper import wide_exchange, wide_pipeline

        module: Any = wide_exchange if what.startswith("what is given") else wide_pipeline
        wait: Callable[..., None] = module.mbarrier.wait

        def in_no_order(barrier: Any, phase: Any) -> None:
            if module is wide_pipeline:
                wait(barrier, int(phase) ^ 1)

        change = patch.object(module, "mbarrier", type("mbarrier", (), {**vars(module.mbarrier), "wait": in_no_order}))
        patience = patch("verify.emulator.machine.PATIENCE_SECONDS", 2.0)
        with change, patience, pytest.raises((EmulationError, AssertionError)):
            judge(CASES[4], torch.float16, ALL)


def test_every_head_dim_has_two_chunks_and_tiles() -> None:
    """Each consumer has a chunk, and both fit the registers."""
    for head_dim in range(136, 257, 8):
        width = padded_width(head_dim)
        chunks = pipeline_chunks(width)
        assert head_dim <= sum(chunks) == width and len(chunks) == 2 and max(chunks) == 128
        assert PIPELINES["sm_90"][width]["tangents"].keys() == ALL
    assert hopper_tables.DQ_ACCUM_FROM.keys().isdisjoint({160, 192, 256})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, dtype, ALL, "cuda")
