"""The warp-specialised kernels give the exact results, in an emulator of the GPU and, on one, compiled."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flashjvp.kernels.launch.hopper_tables import ONE_PASS_UNLESS_SUMMED
from flashjvp.kernels.launch.hopper_tables import PIPELINES as TABLES
from flashjvp.kernels.launch.schedule import padded_width
from tests.flashjvp.kernels.additive_cases import ADDITIVE, PLAIN
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.emulator.gluon import emulated
from verify.emulator.machine import EmulationError
from verify.oracles.attention import dense64, dense_same_type, run

ROOT = Path(__file__).resolve().parents[3]
CASES = (
    Case("square", batch=(1,), m=128, n=128, d=64, dv=64),
    Case("ragged_64", batch=(2,), m=200, n=150, d=64, dv=64),
    Case("ragged_128", batch=(1,), q_heads=1, kv_heads=1, m=70, n=300, d=128, dv=128),
    Case("one_row", batch=(1,), q_heads=1, kv_heads=1, m=1, n=1, d=64, dv=64),
    Case("no_batch", batch=(), q_heads=2, kv_heads=2, m=40, n=90, d=128, dv=128),
    Case("gqa_64", batch=(1,), q_heads=4, kv_heads=2, m=90, n=130, d=64, dv=64),
    Case("mqa_causal_128", batch=(1,), q_heads=2, kv_heads=1, m=150, n=150, d=128, dv=128, is_causal=True),
    Case("causal_64", batch=(1,), q_heads=1, kv_heads=1, m=300, n=300, d=64, dv=64, is_causal=True),
    Case("causal_more_keys", batch=(1,), q_heads=1, kv_heads=1, m=60, n=300, d=64, dv=64, is_causal=True),
    Case("causal_more_queries", batch=(1,), q_heads=1, kv_heads=1, m=300, n=60, d=128, dv=128, is_causal=True),
    Case("packed", batch=(2,), m=100, n=100, d=64, dv=64, layout="packed"),
    Case("sequence_major", batch=(2,), m=33, n=65, d=64, dv=64, layout="sequence_major"),
    Case("scale", batch=(1,), m=64, n=70, d=64, dv=64, scale=0.3),
    Case("plain_64", batch=(1,), q_heads=2, kv_heads=1, m=130, n=150, d=64, dv=64, **PLAIN),
    Case("plain_128", batch=(1,), q_heads=1, kv_heads=1, m=130, n=270, d=128, dv=56, **PLAIN),
    Case("plain_causal_128", batch=(1,), q_heads=1, kv_heads=1, m=200, n=200, d=128, dv=128, is_causal=True, **PLAIN),
    Case("cotangent_o", batch=(1,), q_heads=1, kv_heads=1, m=65, n=70, d=64, dv=64, cotangents=("o",)),
    Case("large_mu", batch=(1,), q_heads=1, kv_heads=1, m=64, n=200, d=64, dv=64, kind="large_mu"),
    Case("one_hot", batch=(1,), q_heads=1, kv_heads=1, m=130, n=300, d=128, dv=128, kind="one_hot"),
    Case("scores_3", batch=(2,), m=60, n=130, d=64, dv=64, magnitude=3.0),
    Case("scores_10_72", batch=(2,), m=60, n=300, d=72, dv=72, magnitude=10.0),
    Case("low_scores", batch=(1,), q_heads=2, kv_heads=1, m=64, n=80, d=64, dv=64, kind="low_scores"),
    Case("low_scores_72", batch=(1,), q_heads=1, kv_heads=1, m=70, n=150, d=72, dv=72, kind="low_scores"),
    Case("low_scores_128", batch=(1,), q_heads=1, kv_heads=1, m=130, n=70, d=128, dv=128, kind="low_scores"),
    Case("low_scores_causal_96", batch=(1,), q_heads=1, kv_heads=1, m=150, n=100, d=96, dv=96, kind="low_scores",
         is_causal=True),
    Case("low_scores_mask_128", batch=(1,), q_heads=1, kv_heads=1, m=70, n=150, d=128, dv=128, kind="low_scores",
         mask="bool"),
    Case("low_scores_mask_per_key_128", batch=(1,), q_heads=1, kv_heads=1, m=70, n=150, d=128, dv=128,
         kind="low_scores", mask="bool", mask_shape="per_key"),
    Case("low_scores_plain", batch=(1,), m=70, n=150, d=72, dv=72, kind="low_scores", **PLAIN),
    Case("constant_keys", batch=(1,), q_heads=1, kv_heads=1, m=64, n=80, d=64, dv=64, kind="constant_keys"),
    Case("zeros", batch=(1,), q_heads=1, kv_heads=1, m=33, n=65, d=64, dv=64, kind="zeros"),
    Case("ragged_72", batch=(2,), q_heads=2, kv_heads=2, m=200, n=150, d=72, dv=72),
    Case("one_row_72", batch=(), q_heads=1, kv_heads=1, m=1, n=1, d=72, dv=72),
    Case("gqa_72", batch=(1,), q_heads=4, kv_heads=2, m=90, n=130, d=72, dv=72),
    Case("causal_72", batch=(1,), q_heads=1, kv_heads=1, m=300, n=300, d=72, dv=72, is_causal=True),
    Case("packed_72", batch=(2,), m=100, n=100, d=72, dv=72, layout="packed"),
    Case("plain_72", batch=(1,), q_heads=2, kv_heads=1, m=130, n=270, d=72, dv=72, **PLAIN),
    Case("plain_causal_72", batch=(1,), q_heads=1, kv_heads=1, m=200, n=200, d=72, dv=72, is_causal=True, **PLAIN),
    Case("one_hot_72", batch=(1,), q_heads=1, kv_heads=1, m=130, n=300, d=72, dv=72, kind="one_hot"),
    Case("square_80", batch=(1,), q_heads=1, kv_heads=1, m=128, n=128, d=80, dv=80),
    Case("gqa_causal_80", batch=(2,), q_heads=4, kv_heads=2, m=150, n=210, d=80, dv=80, is_causal=True),
    Case("ragged_96", batch=(1,), q_heads=2, kv_heads=1, m=70, n=190, d=96, dv=96),
    Case("one_row_96", batch=(), q_heads=1, kv_heads=1, m=1, n=1, d=96, dv=96),
    Case("mqa_causal_96", batch=(2,), q_heads=2, kv_heads=1, m=200, n=150, d=96, dv=96, is_causal=True),
    Case("causal_more_keys_96", batch=(1,), q_heads=1, kv_heads=1, m=60, n=300, d=96, dv=96, is_causal=True),
    Case("ragged_88", batch=(2,), m=140, n=270, d=88, dv=88, layout="sequence_major"),
    Case("plain_88", batch=(1,), q_heads=1, kv_heads=1, m=130, n=150, d=88, dv=88, **PLAIN),
    Case("padded_56", batch=(1,), q_heads=1, kv_heads=1, m=100, n=150, d=56, dv=56),
    Case("padded_120", batch=(1,), q_heads=1, kv_heads=1, m=100, n=150, d=120, dv=120),
    Case("scores_1e4", batch=(1,), q_heads=1, kv_heads=1, m=64, n=150, d=64, dv=64, magnitude=1e4),
    Case("padded_40", batch=(2,), q_heads=2, kv_heads=1, m=130, n=150, d=40, dv=40),
    Case("padded_48_plain", batch=(1,), m=130, n=150, d=48, dv=48, **PLAIN),
    Case("values_wider", batch=(1,), q_heads=2, kv_heads=1, m=100, n=150, d=64, dv=128),
    Case("values_narrower", batch=(1,), m=100, n=150, d=128, dv=64),
    Case("values_narrower_causal_128", batch=(2,), q_heads=2, kv_heads=1, m=150, n=170, d=120, dv=40, is_causal=True),
    Case("values_narrower_80", batch=(1,), m=70, n=150, d=80, dv=40),
    Case("values_wider_96", batch=(2,), m=70, n=150, d=56, dv=96, is_causal=True),
    Case("values_narrower_plain", batch=(1,), m=70, n=150, d=72, dv=8, **PLAIN),
    Case("q_t_alone", batch=(1,), m=130, n=150, d=64, dv=64, tangents=("q",)),
    Case("k_t_alone_72", batch=(2,), q_heads=2, kv_heads=1, m=130, n=70, d=72, dv=72, tangents=("k",)),
    Case("k_t_and_v_t_128", batch=(1,), m=70, n=150, d=128, dv=128, tangents=("k", "v")),
    Case("two_tangents_96", batch=(1,), m=70, n=150, d=96, dv=96, tangents=("q", "v"), is_causal=True),
    Case("cotangent_o_t", batch=(2,), q_heads=2, kv_heads=1, m=130, n=150, d=64, dv=64, cotangents=("o_t",)),
    Case("cotangent_o_t_128", batch=(1,), m=70, n=150, d=128, dv=128, cotangents=("o_t",), tangents=("q",)),
    Case("mask_64", batch=(2,), q_heads=2, kv_heads=2, m=200, n=150, d=64, dv=64, mask="bool"),
    Case("mask_128", batch=(1,), q_heads=1, kv_heads=1, m=130, n=300, d=128, dv=128, mask="bool"),
    Case("mask_72", batch=(1,), q_heads=1, kv_heads=1, m=150, n=133, d=72, dv=72, mask="bool"),
    Case("mask_96", batch=(1,), q_heads=1, kv_heads=1, m=70, n=128, d=96, dv=96, mask="bool"),
    Case("mask_plain", batch=(1,), q_heads=1, kv_heads=1, m=130, n=150, d=64, dv=64, mask="bool", **PLAIN),
    Case("mask_empty_rows", batch=(2,), q_heads=1, kv_heads=1, m=140, n=150, d=64, dv=64, mask="bool",
         mask_shape="empty_rows"),
    Case("mask_empty_rows_128", batch=(1,), m=66, n=70, d=128, dv=64, mask="bool", mask_shape="empty_rows"),
    Case("mask_empty_rows_plain", batch=(1,), q_heads=1, kv_heads=1, m=66, n=70, d=72, dv=72, mask="bool",
         mask_shape="empty_rows", **PLAIN),
    Case("mask_per_key", batch=(2,), q_heads=1, kv_heads=1, m=140, n=200, d=64, dv=64, mask="bool",
         mask_shape="per_key"),
    Case("mask_per_row", batch=(2,), q_heads=1, kv_heads=1, m=140, n=70, d=64, dv=64, mask="bool",
         mask_shape="per_row"),
    Case("mask_per_batch", batch=(2,), q_heads=2, kv_heads=1, m=20, n=260, d=128, dv=128, mask="bool",
         mask_shape="per_batch"),
    Case("mask_per_head", batch=(2,), q_heads=4, kv_heads=2, m=90, n=130, d=64, dv=64, mask="bool",
         mask_shape="per_head"),
    Case("mask_matrix_aligned", batch=(2,), q_heads=1, kv_heads=1, m=64, n=256, d=64, dv=64, mask="bool",
         mask_shape="matrix"),
    Case("mask_causal", batch=(1,), q_heads=1, kv_heads=1, m=200, n=230, d=64, dv=64, mask="bool", is_causal=True),
    Case("mask_causal_128", batch=(1,), q_heads=1, kv_heads=1, m=150, n=140, d=128, dv=128, mask="bool",
         is_causal=True),
    Case("mask_no_batch", batch=(), q_heads=2, kv_heads=2, m=40, n=90, d=64, dv=64, mask="bool"),
    *ADDITIVE,
)  # fmt: skip
NOT_SERVED = (
    Case("v_t_alone", batch=(1,), m=64, n=70, d=64, dv=64, tangents=("v",)),
    Case("negative_scale", batch=(1,), m=64, n=70, d=64, dv=64, scale=-0.3),
    Case("mask_of_queries", batch=(1,), m=64, n=64, d=64, dv=64, mask="additive", mask_shape="per_row"),
    Case("other_width", batch=(1,), m=64, n=64, d=24, dv=24),
    Case("two_batch_dims", batch=(1, 2), m=64, n=64, d=64, dv=64),
)
PIPELINES = TABLES["sm_90"]
IN_PAIRS = False  # queries of a head dim of 64: test_pairs.py
FAMILIES = {family for width in (64, 80, 96, 128) for tiles in PIPELINES[width].values() for family in tiles}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator serves machines without a GPU")


@contextlib.contextmanager
def pipelines_in_use(ordered: bool) -> Iterator[list[str]]:
    """On CPU tensors, too; `ordered` is PyTorch's deterministic mode. Yields the families that are launched."""
    from flashjvp.kernels.launch import replaced

    launched: list[str] = []

    def launch(original: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **flags: Any) -> None:
        launched.extend([family] if "STAGES" in flags else [])
        original(call, kernel, family, *rest, **flags)

    torch.use_deterministic_algorithms(ordered, warn_only=True)
    with replaced.pipelines(PIPELINES, dq_accum_from={}, in_pairs=IN_PAIRS), replaced.launch(launch):
        yield launched


def judge(case: Case, dtype: torch.dtype, ordered: bool, device: str = "cpu", of: Any = None) -> None:
    """Within the budgets, by the families that `of` gives for a call: `expected` unless another function is given."""
    inputs = make_inputs(case, dtype, device)
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense_same_type(inputs))
    with pipelines_in_use(ordered) as launched:
        results = run(inputs, "triton")
    assert set(launched) == (of or expected)(inputs, ordered)
    assert not [row for row in check(results, exact, budgets) if not row.ok]


def expected(inputs: Inputs, ordered: bool, in_one_pass: bool = True) -> set[str]:
    """The families that serve a call; one of half types, not causal, without a block mask, may be `in_one_pass`."""
    columns = padded_width(max(inputs.q.shape[-1], inputs.v.shape[-1]))
    families = set(PIPELINES[columns]["plain" if inputs.d_o_t is None else "tangents"]) | {"forward"}
    in_one_pass = in_one_pass and (ordered or columns not in ONE_PASS_UNLESS_SUMMED)
    if in_one_pass and "backward_one_pass" in families and inputs.mask is None and not inputs.is_causal:
        return {"forward", "backward_one_pass"} | ({"backward_query"} if ordered else set())
    families -= {"backward_one_pass"}
    if ordered or not families & {"backward_pairs", "backward_dq_accum"}:
        return families - {"backward_dq_accum"}
    return families - {"backward_query"} - ({"backward_key"} if "backward_dq_accum" in families else set())


@interpreted
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, ordered: bool, dtype: torch.dtype) -> None:
    with emulated():
        judge(case, dtype, ordered)


@interpreted
@pytest.mark.sampled(of=20)
@pytest.mark.parametrize("threshold", [None, 0.5], ids=["threshold as it is", "a threshold that scores pass"])
@pytest.mark.parametrize("case", [case for case in CASES if case.magnitude == 1], ids=str)
def test_scores_whose_maximum_is_scaled_first(case: Case, threshold: float | None) -> None:
    """As bfloat16 is computed, which the interpreter of the other kernels does not serve."""
    with emulated():
        from flashjvp.kernels.hopper import forward

        threshold = forward.RESCALE_THRESHOLD if threshold is None else threshold
        with (
            patch.object(forward, "_subtracts_first", lambda dtype: False),
            patch.object(forward, "RESCALE_THRESHOLD", threshold),
        ):
            judge(case, torch.float32, True)


@interpreted
def test_float16_needs_the_maximum_subtracted_before_scores_are_scaled() -> None:
    """Else what the scaled maximum lost to rounding is left in the exponent of one-hot rows."""
    case = next(case for case in CASES if case.name == "scores_1e4")
    with emulated():
        from flashjvp.kernels.hopper import forward

        scaled_first = patch.object(forward, "_subtracts_first", lambda dtype: False)
        with (
            scaled_first,
            patch.object(forward, "RESCALE_THRESHOLD", 0.0),
            pytest.raises(AssertionError, match="tensor='o'"),
        ):
            judge(case, torch.float16, True)


@interpreted
def test_every_tier_emulates_every_family(request: pytest.FixtureRequest) -> None:
    """The part of test_emulated that is run, whichever that is."""
    items = [item for item in request.session.items if item.name.startswith("test_emulated[")]
    calls = [item.callspec.params for item in items if item.path == request.path]  # type: ignore[attr-defined]
    if len(calls) < 40:
        pytest.skip("a few tests are run by their names")
    found = [expected(make_inputs(call["case"], torch.float32), call["ordered"]) for call in calls]
    assert set().union(*found) == FAMILIES


@interpreted
@pytest.mark.parametrize("case", NOT_SERVED, ids=str)
def test_other_calls_take_the_other_kernels(case: Case) -> None:
    with emulated(), pipelines_in_use(True) as launched:
        inputs = make_inputs(case, torch.float32)
        results = run(inputs, "triton")
    assert not launched
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense_same_type(inputs))
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@interpreted
@pytest.mark.parametrize("what", ["a wait too short", "a phase too early", "an arrival too many"])
def test_the_emulator_sees(what: str) -> None:
    """A kernel that does not wait for a product, reads a tile before it is full, or frees one twice."""
    with emulated():
        from flashjvp.kernels.hopper import forward, mainloop

        if what == "a wait too short":
            wait = forward.warpgroup_mma_wait
            change = patch.object(forward, "warpgroup_mma_wait", lambda n=0, deps=(): wait(n + 1, deps))
        elif what == "a phase too early":
            change = patch.object(mainloop.mbarrier, "wait", lambda barrier, phase: None)
        else:
            twice = mainloop.mbarrier.arrive

            def arrive(barrier: Any, count: int) -> None:
                twice(barrier, count=2 * count)

            change = patch.object(mainloop.mbarrier, "arrive", arrive)
        patience = patch("verify.emulator.machine.PATIENCE_SECONDS", 2.0)
        with change, patience, pytest.raises((EmulationError, AssertionError, TypeError, AttributeError)):
            judge(CASES[1], torch.float32, True)


COMPILE = """
import json
from dataclasses import asdict
from verify.codegen.configuration import Configuration
from verify.codegen.worker import compile_all
found = compile_all(Configuration("sm_90", "half", 128, 128, causal=True))
for d, tangents, ordered in (
    (64, "qkv", True), (72, "qkv", True), (72, "qkv", False), (72, "", True), (96, "qkv", False), (128, "qkv", False)
):
    found += compile_all(Configuration("sm_90", "half", d, d, tangents, ordered=ordered))
found += compile_all(Configuration("sm_90", "tf32", 64, 64))
print(json.dumps([asdict(kernel) for kernel in found]))
"""


@pytest.mark.slow  # `make codegen` compiles more of them
def test_they_compile_for_the_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [kernel for kernel in json.loads(done.stdout) if "warp-specialised" in kernel["family"]]
    assert {kernel["family"].split(",")[0] for kernel in kernels} == FAMILIES
    for kernel in kernels:
        assert not kernel["failure"] and kernel["shared_bytes"] <= 232_448 and kernel["tensor_core"] > 0, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case, ordered: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, dtype, ordered, "cuda")
