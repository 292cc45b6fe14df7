"""The kernel of one pass gives the exact results in the emulator, also at head dims where the table has it not."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flashjvp import environment
from flashjvp.backends.patterns import Band
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import schedule
from flashjvp.kernels.launch.hopper_tables import Pipeline
from tests.flashjvp.kernels import test_hopper
from tests.flashjvp.kernels.test_hopper import CASES, PIPELINES, Case, interpreted, judge
from verify.emulator.gluon import emulated

TILES = {64: Pipeline(64, 3), 80: Pipeline(64, 3), 96: Pipeline(64, 2), 128: Pipeline(64, 2)}


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize(
    "case", [x for x in CASES if x.tangents and "o_t" in x.cotangents and not x.mask and not x.is_causal], ids=str
)
def test_at_every_head_dim(case: Case, ordered: bool) -> None:
    tiles = {
        width: {**kinds, "tangents": {**kinds["tangents"], "backward_one_pass": TILES[width]}}
        for width, kinds in PIPELINES.items()
        if width in TILES
    }
    with emulated(), patch.object(test_hopper, "PIPELINES", tiles):
        judge(case, torch.float16, ordered)


@interpreted
@pytest.mark.parametrize("wanted", ["kv", "qk", "v"])
def test_other_kernels_serve_a_part_of_the_gradients(wanted: str) -> None:
    """Where those of keys or of values are not wanted. Nothing is added up to d_q where nobody wants it."""
    with emulated(), test_hopper.pipelines_in_use(False) as launched:
        from flashjvp import attention_jvp

        inputs = {name: torch.randn(1, 1, 70, 128, dtype=torch.float16) for name in "qkv"}
        tangents = [torch.randn(1, 1, 70, 128, dtype=torch.float16) for _ in "qkv"]
        for name in wanted:
            inputs[name].requires_grad_()
        o, o_t = attention_jvp(*inputs.values(), *tangents, backend="triton")
        torch.autograd.backward((o, o_t), (torch.randn_like(o), torch.randn_like(o_t)))
    of = {"kv": {"backward_one_pass"}, "qk": {"backward_pairs"}, "v": {"backward_value"}}[wanted]
    assert set(launched) == of | {"forward"}


def test_query_gradients_are_added_up_in_short_calls_alone() -> None:
    """Where masks keep the other kernels, in long ones."""
    torch.use_deterministic_algorithms(False)
    tiles = PIPELINES[128]["tangents"]
    found = {rows: schedule.key_side_pipeline(tiles, 128, rows) for rows in (1, 2047, 2048)}
    one_pass = "backward_one_pass"
    assert found == {1: (one_pass, True), 2047: (one_pass, True), 2048: (one_pass, False)}
    masked = {rows: schedule.key_side_pipeline(tiles, 128, rows, in_one_pass=False) for rows in (2047, 2048)}
    assert masked == {2047: ("backward_pairs", False), 2048: ("backward_pairs", True)}


def test_at_72_one_pass_serves_what_nothing_is_added_up_of() -> None:
    """Short calls, packed sequences, PyTorch's deterministic mode."""
    torch.use_deterministic_algorithms(False)
    tiles = PIPELINES[80]["tangents"]
    found = {rows: schedule.key_side_pipeline(tiles, 80, rows) for rows in (1023, 1024)}
    assert found == {1023: ("backward_one_pass", False), 1024: ("backward_dq_accum", True)}
    assert schedule.key_side_pipeline(tiles, 80, 4096, both_wanted=False) == ("backward_one_pass", False)
    torch.use_deterministic_algorithms(True)
    try:
        assert schedule.key_side_pipeline(tiles, 80, 4096) == ("backward_one_pass", False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_dense_calls_take_it_where_it_was_measured() -> None:
    """Of a release and a head dim. Windows and packed sequences have a table of their own."""

    def found(release: tuple[int, int], width: int, pattern: object = None) -> bool:
        call: Any = SimpleNamespace(pattern=pattern, width=width, precision="half", mask=None, is_causal=False)
        with patch.object(environment, "triton_release", lambda: release):
            return eligibility.in_one_pass(call)

    assert found((3, 6), 128) and found((3, 6), 80) and not found((3, 6), 64)
    assert found((3, 9), 96) and not found((3, 9), 128) and not found((99, 0), 96)
    assert found((99, 0), 128, Band(-1, 1))
