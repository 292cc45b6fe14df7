import ast
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import isolate, tile_table, tune, tune_worker
from bench.tile_table import current
from bench.trials import COLUMNS, Candidate, Trial, candidates, read_trials, winners, write_trials
from flashjvp.kernels.launch import hopper_tables, schedule
from flashjvp.kernels.launch.call import Call
from flashjvp.kernels.launch.hopper_tables import PIPELINES, Pipeline
from flashjvp.kernels.launch.schedule import Tile
from reports.schema import DamagedError, VersionError
from verify.budget import tolerance
from verify.emulator.gluon import emulated
from verify.oracles import attention as oracles

# A worker that answers without compiling anything: what it says of a candidate depends on its key rows.
FAKE = """
import json, sys
events = json.loads(sys.stdin.readline())["cells"]
for cell in events:
    print(json.dumps({"event": "start", "id": cell["id"]}), flush=True)
    if cell["tile"][1] == 128:
        sys.exit(7)
    status = "skipped" if cell["tile"][1] == 16 else "compiled" if cell["stage"] == "compile" else "ok"
    outcome = {"status": status, "reason": "spills" if status == "skipped" else ""}
    timed = {"latency_p50_ms": 1 / cell["tile"][0], "repeats": 9}
    outcome |= {"registers": 64} if cell["stage"] == "compile" else timed
    print(json.dumps({"event": "outcome", "id": cell["id"], **outcome}), flush=True)
sys.stdin.read()
"""
FAMILIES = ("forward", "rowsums", "backward_query", "backward_key", "backward_value", "backward_key_value")


def make_trial(tile: Sequence[int], ms: float | None, head_dim: int = 64, **changes: Any) -> Trial:
    kind, family = changes.pop("kind", "half"), changes.pop("family", "forward")
    candidate = Candidate("sm_90", kind, family, head_dim, tuple(tile))
    values: dict[str, Any] = {
        "candidate": candidate, "status": "compiled" if ms is None else "ok", "registers": 240, "spill_bytes": 0,
        "loop_spill_share": 0.0, "shared_bytes": 1024, "latency_p50_ms": ms, "machine": "a", "driver": "b",
        "torch_version": "c", "triton_version": "d", "commit": "e", "date_utc": "2025-01-01T00:00:00Z",
    }  # fmt: skip
    return Trial(**(values | changes))


def run_fake(tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "worker.py"
    path.write_text(FAKE)
    out = ["--log", str(tmp_path / "log.csv"), "--out", str(tmp_path / "tables.py")]
    options = ["--family", "forward", "--head-dim", "64", *out, *arguments]
    return tune.main(options, worker=(sys.executable, str(path)))


def test_candidates_come_in_one_order_with_the_tile_in_use_first() -> None:
    found = candidates("sm_90", "half", ["forward", "rowsums", "backward_key_value"], [64, 72, 128])
    assert found == candidates("sm_90", "half", ["forward", "rowsums", "backward_key_value"], [64, 72, 128])
    assert len(set(found)) == len(found)
    first = found[:7]
    assert [(x.family, x.head_dim) for x in first] == [
        *(("forward", d) for d in (64, 72, 128)),
        *(("rowsums", d) for d in (64, 72, 128)),
        ("backward_key_value", 64),  # which a wider head dim does not have
    ]
    assert all(x.tile == current(x.entry) for x in first)
    assert {x.entry[3] for x in found if x.head_dim == 72} == {128}
    assert all((x.tile[1], x.tile[3]) == (0, 1) for x in found if x.family == "rowsums")


def test_tiles_of_the_warp_specialised_kernels_are_candidates_too() -> None:
    families = ["forward", "backward_key", "backward_sums", "backward_value", "backward_pairs", "backward_query"]
    found = candidates("sm_90", "tangents", families, [64, 72, 128, 256])
    first = {(x.family, x.entry[3]): x.tile for x in reversed(found)}
    assert first == {
        (family, width): tuple(tiles["tangents"][family])
        for width, tiles in PIPELINES["sm_90"].items()
        if width != 96
        for family in tiles["tangents"]
    }
    near = [x.tile for x in found if (x.family, x.head_dim) == ("backward_query", 128)][:7]
    assert near[0] == (32, 3, 0, 1, 0)  # in use; then one step away: half or twice the rows, a stage, a held tile
    assert set(near[1:5]) == {(64, 3, 0, 1, 0), (32, 2, 0, 1, 0), (32, 4, 0, 1, 0), (32, 3, 1, 1, 0)}
    assert {x.tile[2:] for x in found if x.family in ("backward_value", "backward_pairs")} == {(0, 1, 0)}
    assert {x.tile[4] for x in found if x.family == "backward_sums"} == {1, 2}
    assert {x.family for x in candidates("sm_90", "plain", families, [128])} == {
        "forward", "backward_key", "backward_query"
    }  # fmt: skip
    assert not candidates("sm_80", "plain", families, [128])


def test_the_log_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.csv"
    trials = [
        make_trial((64, 64, 4, 3), 0.1 + 0.2, latency_p20_ms=1 / 3, repeats=30),
        make_trial((32, 64, 4, 3), None, status="skipped", reason='spills: "12", %', registers=None),
    ]
    write_trials(path, trials)
    assert read_trials(path) == trials
    assert path.read_text().split("\n")[0] == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("change", "line", "kind"),
    [
        (lambda text: text.replace("head_dim", "width"), 1, DamagedError),
        (lambda text: text.replace("compiled", "splendid"), 3, DamagedError),
        (lambda text: text[: text.rindex(",")], 3, DamagedError),
        (lambda text: text.replace("64x64x4x3", "64x64xx3"), 2, DamagedError),
        (lambda text: text.replace("\n2,", "\n9,", 1), 2, VersionError),
        (lambda text: text.replace("half,forward,64", "half,forward,wide", 1), 2, DamagedError),
    ],
)
def test_a_damaged_log_names_its_line(tmp_path: Path, change: Any, line: int, kind: type[Exception]) -> None:
    path = tmp_path / "log.csv"
    write_trials(path, [make_trial((64, 64, 4, 3), 1.0), make_trial((32, 64, 4, 3), None)])
    path.write_text(change(path.read_text()))
    with pytest.raises(kind, match=f"line {line}: "):
        read_trials(path)


def test_a_tile_gives_way_only_to_one_that_is_clearly_faster() -> None:
    entry = ("sm_90", "half", "forward", 64)
    now = current(entry)
    other = Tile(*now)._replace(stages=now[3] + 1)
    assert winners([make_trial(now, 1.0), make_trial(other, 0.99)]) == {entry: now}
    assert winners([make_trial(now, 1.0), make_trial(other, 0.9)]) == {entry: other}
    assert winners([make_trial(now, None, status="skipped"), make_trial(other, 5.0)]) == {entry: other}
    assert winners([make_trial(now, None), make_trial(other, None)]) == {}


def test_head_dims_that_share_an_entry_are_judged_together() -> None:
    entry = ("sm_90", "half", "forward", 128)
    now, fast, narrow = current(entry), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    both = [make_trial(now, 1.0, d) for d in (72, 128)] + [make_trial(fast, 0.5, 72), make_trial(fast, 1.2, 128)]
    assert winners(both) == {entry: fast}
    assert winners([*both, make_trial(narrow, 0.1, 72)]) == {entry: fast}
    slower = [
        replace(x, latency_p50_ms=4.0) if (x.candidate.tile, x.candidate.head_dim) == (fast, 128) else x for x in both
    ]
    assert winners(slower) == {entry: now}
    assert winners([make_trial(fast, 0.5, 72), make_trial(fast, None, 128)]) == {}


def test_the_file_of_tiles_holds_every_entry_and_keeps_the_style(tmp_path: Path) -> None:
    path = tmp_path / "tables.py"
    tile_table.write(path, "half", {})
    (assigned,) = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.AnnAssign)]
    assert assigned.value is not None
    assert ast.literal_eval(assigned.value) == schedule.TABLES  # a named tuple is equal to a tuple
    assert list(tmp_path.iterdir()) == [path]
    judge_style(path)


def judge_style(path: Path) -> None:
    if ruff := shutil.which("ruff", path=str(Path(sys.executable).parent)):
        for command in (["format", "--check"], ["check"]):
            config = str(Path(__file__).parents[2] / "pyproject.toml")
            subprocess.run([ruff, *command, "--config", config, str(path)], check=True)


def test_a_change_of_the_table_touches_nothing_else() -> None:
    before = tile_table.source(schedule.TABLES)
    tile = Tile(16, 16, 4, 1)
    new = tile_table.changed(schedule.TABLES, {("sm_90", "half", "backward_value", 64): tile})
    assert new["sm_90"]["half"]["backward_value"][64] == tile
    assert tile_table.source(schedule.TABLES) == before
    lines = zip(before.splitlines(), tile_table.source(new).splitlines(), strict=True)
    assert sum(old != line for old, line in lines) == 1  # architectures that shared a table no longer do


def test_the_file_of_pipelines_changes_in_one_line(tmp_path: Path) -> None:
    assert tile_table.pipelines_source(PIPELINES) == tile_table.path_of("tangents").read_text()
    path = tmp_path / "hopper_tables.py"
    tile_table.write(path, "tangents", {("sm_90", "tangents", "backward_key", 64): (64, 5, 2)})
    before, after = tile_table.path_of("plain").read_text().splitlines(), path.read_text().splitlines()
    changes = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    tile = PIPELINES["sm_90"][64]["tangents"]["backward_key"]
    assert len(changes) == 1 and str(tile.rows) in changes[0][0]
    assert changes[0][1] == '"backward_key": Pipeline(64, 5, held=2),'
    judge_style(path)


def test_the_search_compiles_logs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fake(tmp_path, "--compile-only") == 0
    log = tmp_path / "log.csv"
    trials = read_trials(log)
    assert {x.candidate for x in trials} == set(candidates("sm_90", "half", ["forward"], [64]))
    by_rows = {rows: {x.status for x in trials if x.candidate.tile[1] == rows} for rows in (16, 64, 128)}
    assert by_rows == {16: {"skipped"}, 64: {"compiled"}, 128: {"crashed"}}
    assert not (tmp_path / "tables.py").exists()

    assert run_fake(tmp_path, "--compile-only") == 2
    assert "--resume continues it" in capsys.readouterr().out

    write_trials(log, trials[:-1])
    (tmp_path / "worker.py").write_text("")
    assert run_fake(tmp_path, "--compile-only", "--resume") == 0
    again = read_trials(log)
    assert again[:-1] == trials[:-1]
    assert again[-1].candidate == trials[-1].candidate


def test_what_compiled_is_timed_and_the_fastest_goes_into_the_table(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(FAKE)
    worker, console = (sys.executable, str(tmp_path / "worker.py")), Console(width=160, record=True, quiet=False)
    todo = candidates("sm_90", "half", ["forward"], [64])
    search = tune.Search(tmp_path / "log.csv", torch.device("cpu"), False, 600.0, worker, console)
    search.compile(todo, 1.0)
    search.time(todo)
    trials = {trial.candidate: trial for trial in read_trials(tmp_path / "log.csv")}
    assert trials == search.trials
    timed = [trial for trial in trials.values() if trial.status == "ok"]
    assert {trial.candidate.tile[1] for trial in timed} == {32, 64}
    assert {(trial.registers, trial.repeats) for trial in timed} == {(64, 9)}  # both stages in one line
    (tile,) = winners(trials.values()).values()
    assert tile[0] == 128
    console.print(tune.summary(trials.values(), todo, {todo[0].entry: tile}))
    line = next(line for line in console.export_text().splitlines() if "sm_90 half forward 64" in line)
    counts = [len(timed), *(sum(x.status == status for x in trials.values()) for status in ("skipped", "crashed")), 0]
    assert [int(word) for word in line.replace("│", " ").split()[-4:]] == counts
    assert "x".join(map(str, tile)) in line


def test_a_search_without_a_gpu_of_the_architecture_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_fake(tmp_path, "--family", "rowsums") == 1
    assert "timing needs a GPU of sm_90" in capsys.readouterr().out
    assert {x.status for x in read_trials(tmp_path / "log.csv")} == {"compiled"}


def test_a_spent_budget_tries_nothing(tmp_path: Path) -> None:
    assert run_fake(tmp_path, "--compile-only", "--budget-s", "0") == 0
    assert not (tmp_path / "log.csv").exists()


def test_a_search_that_has_nothing_to_try_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--arch", "sm_80", "--kind", "tangents"]) == 2
    assert "no tangents tile of sm_80" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--family", "sideways"], ["--head-dim", "512"], ["--arch", "sm_30"]])
def test_arguments_are_checked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_launched_once_with_the_candidates_tile(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: what the call returns is right, and its one launch with the tile can be repeated."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are interpreted only where there is no GPU")
    monkeypatch.setattr(tune_worker, "LENGTH", 40)
    monkeypatch.setattr(tune_worker, "HEADS", 1)
    tile = Tile(16, 0 if family == "rowsums" else 32, 4, 1)
    inputs = tune_worker.inputs_of(Candidate("sm_90", "ieee", family, 32, tile), torch.device("cpu"))
    candidate = Candidate("sm_90", "half", family, 32, tile)  # the interpreter takes the tiles of "half" for float32
    exact = oracles.dense64(inputs)
    budgets = tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))
    used: list[tuple[int, ...]] = []
    original = Call.launch

    def seen(*call: Any, **constants: Any) -> None:
        used.append((*constants["TILE"], constants["warps"], constants["stages"]))
        original(*call, **constants)

    monkeypatch.setattr(Call, "launch", seen)
    with tune_worker.tile_in_use(candidate):
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
        ("tangents", "backward_sums", 72, (64, 2, 1, 2, 2)),
        ("tangents", "backward_pairs", 128, (64, 3, 0)),
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
    monkeypatch.setattr(hopper_tables, "SUMS_FROM", {})
    candidate = Candidate("sm_90", kind, family, head_dim, tile)
    inputs = tune_worker.inputs_of(candidate, torch.device("cpu")).map(torch.Tensor.float)
    exact = oracles.dense64(inputs)
    budgets = tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))
    used: list[tuple[Any, ...]] = []
    original, before = Call.launch, torch.are_deterministic_algorithms_enabled()

    def seen(call: Call, kernel: Any, family: str, programs: int, args: Any, *rest: Any, **constants: Any) -> None:
        if "STAGES" not in constants:  # a portable kernel beside it
            return original(call, kernel, family, programs, args, *rest, **constants)
        rows = {x.block_shape[2] for x in args if hasattr(x, "block_shape") and len(x.block_shape) == 4}
        flags = [constants.get(name, default) for name, default in (("HELD", 0), ("PARTS", 1), ("SLOTS", 0))]
        used.append((family, rows, constants["STAGES"], *flags))
        original(call, kernel, family, programs, args, *rest, **constants)

    monkeypatch.setattr(Call, "launch", seen)
    with emulated(), tune_worker.tile_in_use(candidate):
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
        Candidate("sm_90", "half", "rowsums", 64, (64, 0, 4, 1)),
        Candidate("sm_90", "half", "rowsums", 64, (48, 0, 4, 1)),
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
        *[("tangents", family, 128) for family in ("forward", "backward_pairs", "backward_value", "backward_query")],
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
