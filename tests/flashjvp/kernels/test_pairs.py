"""Queries in pairs at a head dim of 64 give the exact results, in an emulator of the GPU and, on one, compiled."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.hopper_tables import MEASURED_PAIRS, PERSISTENT, PIPELINES
from tests.flashjvp.kernels import (
    test_hopper,
    test_hopper_bands,
    test_hopper_block_masks,
    test_per_tensor_scaling,
    test_persistent,
)
from tests.flashjvp.kernels.test_hopper import interpreted
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import dense_tf32, tf32
from verify.emulator.gluon import emulated
from verify.oracles.attention import run


def at_64(cases: tuple[Case, ...]) -> list[Case]:
    """Those of a padded head dim of 64 with tangents."""
    return [case for case in cases if case.tangents and 32 < max(case.d, case.dv) <= 64]


DENSE = at_64(test_hopper.CASES)
BANDS = at_64(test_hopper_bands.CASES)
BLOCK_MASKS = at_64(test_hopper_block_masks.CASES)
FORMS = {name: form for name, form in test_hopper_bands.FORMS.items() if form["d"] == 64 and "tangents" not in form}


@pytest.fixture(autouse=True)
def pairs() -> Iterator[None]:
    with patch.object(test_hopper, "IN_PAIRS", True):
        yield


@interpreted
@pytest.mark.sampled(of=20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_emulated(case: Case, dtype: torch.dtype) -> None:
    """Dense calls, causal ones, masks."""
    with emulated():
        test_hopper.judge(case, dtype, True)


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("case", at_64(test_per_tensor_scaling.WITHOUT_BIAS), ids=str)
def test_scaled_emulated(case: Case) -> None:
    with emulated(), tf32():
        test_per_tensor_scaling.judge(case, True, dense_tf32, "cpu")


@interpreted
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("window", test_hopper_bands.WINDOWS, ids=str)
@pytest.mark.parametrize("case", BANDS, ids=str)
def test_windows_emulated(case: Case, window: test_hopper_bands.Window) -> None:
    with emulated():
        test_hopper_bands.judge(case, window, torch.float16, True)


@interpreted
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", test_hopper_bands.LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_sequences_emulated(form: str, lengths: str, is_causal: bool) -> None:
    with emulated():
        test_hopper_bands.judge_packed(FORMS[form], lengths, is_causal)


@interpreted
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("mask", test_hopper_block_masks.MASKS, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("case", BLOCK_MASKS, ids=str)
def test_block_masks_emulated(case: Case, mask: Callable[..., Any]) -> None:
    with emulated():
        test_hopper_block_masks.judge(case, mask, torch.float16, True)


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("case", at_64(test_persistent.CASES), ids=str)
def test_persistent_emulated(case: Case, programs: int, machine: Callable[..., None]) -> None:
    machine(multiprocessors=programs)
    with emulated():
        test_persistent.judge(case, PERSISTENT, torch.float16, "cpu", in_pairs=True)


def pairs_of(case: Case, dtype: torch.dtype = torch.float16, in_pairs: bool = True) -> set[bool]:
    """What the kernels of d_k are told about pairs in a call."""
    told: set[bool] = set()

    def noted(launch: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **flags: Any) -> None:
        told.update([flags["PAIRS"]] if "PAIRS" in flags else [])
        launch(call, kernel, family, *rest, **flags)

    tables = replaced.pipelines(PIPELINES["sm_90"], persistent=PERSISTENT, in_pairs=in_pairs)
    with emulated(), tables, replaced.launch(noted):
        run(make_inputs(case, dtype), "triton")
    return told


@interpreted
def test_who_takes_pairs() -> None:
    """Calls with tangents at a head dim of 64, where the table has this release of Triton."""
    small: dict[str, Any] = {"batch": (1,), "q_heads": 1, "kv_heads": 1, "m": 40, "n": 50}
    dense = Case("dense", **small, d=64, dv=64)
    assert pairs_of(dense) == {True}
    assert pairs_of(dense, in_pairs=False) == {False}
    assert pairs_of(Case("causal", **small, d=64, dv=64, is_causal=True)) == {True}
    assert pairs_of(Case("mask", **small, d=64, dv=64, mask="bool")) == {True}
    assert pairs_of(Case("plain", **small, d=64, dv=64, tangents=(), cotangents=("o",))) == {False}
    assert pairs_of(Case("narrow", **small, d=40, dv=40)) == {True}
    assert pairs_of(Case("wider", **small, d=96, dv=96, is_causal=True)) == {False}


def test_releases_that_take_pairs(machine: Callable[..., None]) -> None:
    """At other head dims nothing is written for it: at 128 pairs are those of launch.py."""
    call: Any = SimpleNamespace(width=64)
    assert set(MEASURED_PAIRS) == {64}
    for release in ((3, 6), (3, 8), (3, 9), (99, 0)):
        machine(triton_release=release)
        assert eligibility.in_pairs(call) == (release in ((3, 6), (3, 9)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_compiled(case: Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    test_hopper.judge(case, dtype, True, "cuda")
