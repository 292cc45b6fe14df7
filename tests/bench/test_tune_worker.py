"""The worker of the tile search launches a kernel with a candidate's tile, and times it only if it is right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import isolate, tune, tune_worker
from bench.trials import Candidate, candidates
from flashjvp.kernels.launch import replaced, schedule
from flashjvp.kernels.launch.hopper_tables import Pipeline
from flashjvp.kernels.launch.schedule import Tile
from verify.budget import tolerance
from verify.emulator.gluon import emulated
from verify.oracles import attention as oracles

FAMILIES = (
    "forward", "backward_preprocess", "backward_query", "backward_key", "backward_value", "backward_key_value",
    "backward_bias",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_launched_once_with_the_candidates_tile(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: what the call returns is right, and its one launch with the tile can be repeated."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are interpreted only where there is no GPU")
    monkeypatch.setattr(tune_worker, "LENGTH", 40)
    monkeypatch.setattr(tune_worker, "HEADS", 1)
    tile = Tile(16, 0 if family == "backward_preprocess" else 32, 4, 1)
    inputs = tune_worker.inputs_of(Candidate("sm_90", "ieee", family, 32, tile), torch.device("cpu"))
    candidate = Candidate("sm_90", "half", family, 32, tile)  # the interpreter takes the tiles of "half" for float32
    exact = oracles.dense64(inputs)
    budgets = tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))
    used: list[tuple[int, ...]] = []

    def seen(launch: Callable[..., None], *call: Any, **constants: Any) -> None:
        used.append((*constants["TILE"], constants["warps"], constants["stages"]))
        launch(*call, **constants)

    with tune_worker.tile_in_use(candidate), replaced.launch(seen):
        results = tune_worker.launch(candidate, inputs)
        (again,) = tune_worker.captured(candidate, inputs)
        used.clear()
        again()
    assert used == [tile]
    assert results
    checked = {name: budgets[name] for name in results}
    assert all(row.ok for row in tolerance.check(replace(exact, **results), exact, checked))


@pytest.mark.parametrize(
    ("kind", "family", "head_dim", "tile"),
    [
        ("tangents", "forward", 128, (32, 3, 0)),
        ("tangents", "backward_key", 64, (64, 3, 2)),
        ("tangents", "backward_key", 72, (64, 2, 1, 2)),  # which sums would stand in for
        ("tangents", "backward_dq_accum", 72, (64, 2, 1, 2, 2)),
        ("tangents", "backward_pairs", 128, (64, 3, 0)),
        ("tangents", "backward_one_pass", 128, (64, 1, 0)),
        ("tangents", "backward_value", 128, (32, 4, 0)),
        ("tangents", "backward_query", 128, (64, 2, 1)),  # which sums would stand in for
        ("plain", "forward", 64, (64, 4, 0)),
        ("plain", "backward_query", 128, (32, 2, 2)),
    ],
)
def test_a_warp_specialised_kernel_is_launched_once_with_the_candidates_tile(
    kind: str, family: str, head_dim: int, tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the emulator: what the call returns is right, and its one launch with the tile can be repeated."""
    if torch.cuda.is_available():
        pytest.skip("the emulator serves machines without a GPU")
    monkeypatch.setattr(tune_worker, "LENGTH", 140)
    monkeypatch.setattr(tune_worker, "HEADS", 1)
    candidate = Candidate("sm_90", kind, family, head_dim, tile)
    inputs = tune_worker.inputs_of(candidate, torch.device("cpu")).map(torch.Tensor.float)
    exact = oracles.dense64(inputs)
    budgets = tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))
    used: list[tuple[Any, ...]] = []
    before = torch.are_deterministic_algorithms_enabled()

    def seen(launch: Callable[..., None], *given: Any, **constants: Any) -> None:
        _, _, family, _, args, *_ = given
        if "STAGES" not in constants:  # a portable kernel beside it
            return launch(*given, **constants)
        rows = {x.block_shape[2] for x in args if hasattr(x, "block_shape") and len(x.block_shape) == 4}
        defaults = {"REGISTER_OPERANDS": 0, "SUB_TILES": 1, "BUFFER_STAGES": 0}
        flags = [constants.get(name, default) for name, default in defaults.items()]
        used.append((family, rows, constants["STAGES"], *flags))
        launch(*given, **constants)

    with emulated(), tune_worker.tile_in_use(candidate), replaced.launch(seen):
        results = tune_worker.launch(candidate, inputs)
        (again,) = tune_worker.captured(candidate, inputs)
        used.clear()
        again()
    assert used == [(family, {64, tile[0]}, *Pipeline(*tile)[1:])]  # tiles of 64 rows are a consumer's own
    assert set(results) == {x for x in oracles.NAMES if (x[0] == "o") == (family == "forward") and
                            (kind == "tangents" or not x.endswith("_t"))}  # fmt: skip
    checked = {name: budgets[name] for name in results}
    assert all(row.ok for row in tolerance.check(replace(exact, **results), exact, checked))
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_candidate_is_timed_only_if_its_results_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels are interpreted only where there is no GPU")
    for name, value in {"DEVICE": torch.device("cpu"), "LENGTH": 40, "HEADS": 1, "CHECKED_LENGTH": 40}.items():
        monkeypatch.setattr(tune_worker, name, value)
    tune_worker.reference.cache_clear()
    candidate = Candidate("sm_90", "ieee", "forward", 32, (32, 32, 8, 1))
    outcome = tune_worker.timed(candidate)
    assert (outcome["status"], outcome["reason"]) == ("ok", "")
    assert 0 < outcome["latency_p20_ms"] <= outcome["latency_p50_ms"] <= outcome["latency_p80_ms"]

    right = tune_worker.launch
    monkeypatch.setattr(
        tune_worker, "launch", lambda *call: {name: x * (1 + (name == "o_t")) for name, x in right(*call).items()}
    )
    outcome = tune_worker.timed(candidate)
    assert outcome["status"] == "wrong"
    assert outcome["reason"].startswith("o_t ")
    assert "latency_p50_ms" not in outcome
    tune_worker.reference.cache_clear()


def test_the_worker_compiles_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    jobs = [
        Candidate("sm_90", "half", "backward_preprocess", 64, (64, 0, 4, 1)),
        Candidate("sm_90", "half", "backward_preprocess", 64, (48, 0, 4, 1)),
        Candidate("sm_90", "plain", "forward", 64, (64, 2, 0)),
        Candidate("sm_90", "tangents", "backward_value", 128, (128, 5, 0)),
    ]
    cells = [{"id": i, "stage": "compile", **vars(job)} for i, job in enumerate(jobs)]
    with tune.child_environment():
        outcomes = [x for _, x in isolate.outcomes(cells, "cuda", 300, lambda _: None, tune.WORKER)]
    assert outcomes[0]["status"] == "compiled"
    assert outcomes[0]["registers"] > 0
    assert outcomes[1]["status"] == "skipped"  # rows of a tile are a power of two
    assert "power of 2" in outcomes[1]["reason"]
    assert outcomes[2]["status"] == "compiled"
    assert outcomes[2]["shared_bytes"] >= 2 * 2 * 2 * 64 * 64  # two stages of tiles of k and v
    assert outcomes[3]["status"] == "skipped"
    assert "shared memory" in outcomes[3]["reason"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "family", "head_dim"),
    [
        *[("half", family, 64) for family in FAMILIES],
        *[
            ("tangents", family, 128)
            for family in ("forward", "backward_pairs", "backward_value", "backward_one_pass", "backward_query")
        ],
        *[(kind, "backward_key", 64) for kind in ("tangents", "plain")],
    ],
)
def test_a_candidate_is_judged_and_timed(kind: str, family: str, head_dim: int) -> None:
    arch = schedule.architecture(torch.device("cuda"))
    if not (found := candidates(arch, kind, [family], [head_dim])):
        pytest.skip(f"there are no {kind} tiles for {arch}")
    candidate = found[0]
    outcome = tune_worker.timed(candidate)
    assert (outcome["status"], outcome["reason"]) == ("ok", "")
    assert outcome["latency_p20_ms"] > 0
