"""Persistent kernels give bit by bit what the kernels of one block a program give, in an emulator of the GPU and, on
one, compiled."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.hopper_tables import PERSISTENT, PIPELINES, Persistent
from tests.flashjvp.kernels.test_hopper import PLAIN, interpreted
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.emulator.gluon import emulated
from verify.oracles.attention import NAMES, Results, run

CASES = (
    Case("more_items_than_programs", batch=(2,), m=256, n=256, d=64, dv=64),
    Case("ragged_64", batch=(2,), m=200, n=150, d=64, dv=64),
    Case("one_row_in_a_block", batch=(3,), m=129, n=129, d=64, dv=64),
    Case("half_a_block", batch=(3,), m=64, n=64, d=64, dv=64),
    Case("fewer_items_than_programs", batch=(), q_heads=1, kv_heads=1, m=100, n=90, d=64, dv=64),
    Case("gqa", batch=(2,), q_heads=4, kv_heads=2, m=130, n=200, d=64, dv=64),
    Case("two_tangents", batch=(2,), m=70, n=140, d=64, dv=64, tangents=("q", "k")),
    Case("cotangent_o_t", batch=(1,), m=130, n=70, d=64, dv=64, cotangents=("o_t",)),
    Case("packed_40", batch=(2,), m=140, n=140, d=40, dv=40, layout="packed"),
    Case("many_keys", batch=(1,), m=70, n=530, d=64, dv=64),
    Case("ragged_128", batch=(2,), m=200, n=150, d=128, dv=128),
    Case("values_narrower_128", batch=(2,), q_heads=2, kv_heads=1, m=150, n=200, d=128, dv=48),
    Case("gqa_128", batch=(1,), q_heads=4, kv_heads=2, m=60, n=200, d=128, dv=128),
)  # fmt: skip
Table = dict[tuple[int, str], tuple[Persistent, ...]]
# The first entry of each family with blocks that are shared or not, the other way round, and with one resident buffer.
OTHERWISE = {
    key: (first._replace(halves=not first.halves, resident_buffers=1),) for key, (first, *_) in PERSISTENT.items()
}


def results_of(
    case: Case, persistent: Table, dtype: torch.dtype, device: str = "cpu", in_pairs: bool = False
) -> tuple[Results, set[str]]:
    """The results of a call, and the families that persistent kernels served."""
    served: set[str] = set()

    def noted(launch: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **flags: Any) -> None:
        served.update([family] if "BUFFERS" in flags else [])
        launch(call, kernel, family, *rest, **flags)

    torch.use_deterministic_algorithms(True, warn_only=True)
    tables = replaced.pipelines(PIPELINES["sm_90"], persistent=persistent, in_pairs=in_pairs)
    with tables, replaced.launch(noted):
        return run(make_inputs(case, dtype, device), "triton"), served


def judge(case: Case, persistent: Table, dtype: torch.dtype, device: str, in_pairs: bool = False) -> None:
    blocks, none = results_of(case, {}, dtype, device, in_pairs)
    found, served = results_of(case, persistent, dtype, device, in_pairs)
    assert not none
    assert served == {family for width, family in persistent if width == max(64, case.d)}
    for name in NAMES:
        expected, x = getattr(blocks, name), getattr(found, name)
        assert (x is None and expected is None) or torch.equal(x, expected), name


@interpreted
@pytest.mark.pairwise
@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("table", [PERSISTENT, OTHERWISE], ids=["as it is", "otherwise"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, table: Table, programs: int, machine: Callable[..., None]) -> None:
    machine(multiprocessors=programs)
    with emulated():
        judge(case, table, torch.float16, "cpu")


@interpreted
def test_other_calls_take_programs_of_one_block() -> None:
    """More keys than the table has, no tangents, causal, a mask."""
    for case in (
        Case("long", batch=(1,), q_heads=1, kv_heads=1, m=10, n=1100, d=128, dv=128),
        Case("plain", batch=(1,), m=40, n=40, d=64, dv=64, **PLAIN),
        Case("causal", batch=(1,), m=40, n=40, d=64, dv=64, is_causal=True),
        Case("mask", batch=(1,), m=40, n=40, d=64, dv=64, mask="bool"),
    ):
        with emulated():
            _, served = results_of(case, PERSISTENT, torch.float16)
        assert not served, case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("table", [PERSISTENT, OTHERWISE], ids=["as it is", "otherwise"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case, table: Table, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(replace(case, batch=(70 * case.batch[0],) if case.batch else ()), table, dtype, "cuda")


def test_which_values_stay_narrow(machine: Callable[..., None]) -> None:
    """Those of at most 64 columns beside q and k that are padded to 128, with the Triton that it was measured with."""
    for release in ((3, 6), (3, 9), (99, 0)):
        machine(triton_release=release)
        for width, columns in ((128, 8), (128, 64), (128, 72), (96, 32), (256, 64)):
            call: Any = SimpleNamespace(width=width, v_columns=(columns,))
            expected = 64 if (release, width) == ((3, 6), 128) and columns <= 64 else None
            assert eligibility.narrow_values(call) == expected
