"""The tile search from its command line: compiles, logs, resumes, and writes the fastest tile into the table."""

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import tune
from bench.tile_cost import cost
from bench.trials import candidates, read_trials, winners, write_trials

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


def run_fake(tmp_path: Path, *arguments: str, family: str = "forward") -> int:
    path = tmp_path / "worker.py"
    path.write_text(FAKE)
    out = ["--log", str(tmp_path / "log.csv"), "--out", str(tmp_path / "tables.py")]
    options = ["--family", family, "--head-dim", "64", *out, *arguments]
    return tune.main(options, worker=(sys.executable, str(path)))


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


def test_by_count_the_cheapest_that_compiles_well_is_chosen_and_nothing_dearer_compiled(tmp_path: Path) -> None:
    """The worker refuses tiles of 16 key rows, and dies of those of 128."""
    assert run_fake(tmp_path, "--arch", "sm_86", "--by-count") == 0
    places = [cost("sm_86", "half", "forward", 64, x.candidate.tile) for x in read_trials(tmp_path / "log.csv")]
    known = [x for x in places if x is not None]
    assert known == sorted(known) and len(known) == len(places)
    chosen = {x.candidate.tile for x in read_trials(tmp_path / "log.csv") if x.status == "compiled"}
    (tile,) = chosen
    assert f"64: {tile}" in (tmp_path / "tables.py").read_text().split('"sm_86"')[1].split('"tf32"')[0]
    assert run_fake(tmp_path, "--kind", "plain", "--by-count") == 2


def test_a_search_without_a_gpu_of_the_architecture_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_fake(tmp_path, family="backward_preprocess") == 1
    assert "timing needs a GPU of sm_90" in capsys.readouterr().out
    assert {x.status for x in read_trials(tmp_path / "log.csv")} == {"compiled"}


def test_a_spent_budget_tries_nothing(tmp_path: Path) -> None:
    assert run_fake(tmp_path, "--compile-only", "--budget-s", "1e-9") == 0
    assert not (tmp_path / "log.csv").exists()


def test_a_search_that_has_nothing_to_try_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--arch", "sm_80", "--kind", "tangents"]) == 2
    assert "no tangents tile of sm_80" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--family", "sideways"], ["--head-dim", "512"], ["--arch", "sm_30"]])
def test_arguments_are_checked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main(arguments)
    assert caught.value.code == 2
