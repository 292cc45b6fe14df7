"""Processes that misbehave, as small programs that speak the worker's protocol without importing torch."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import isolate

HEAD = """
import json, os, signal, sys, time
task = json.loads(sys.stdin.readline())
def say(event): print(json.dumps(event), flush=True)
def answer(cell):
    say({"event": "start", "id": cell["id"]})
    say({"event": "outcome", "id": cell["id"], "status": "ok", "reason": "", "pid": os.getpid()})
for cell in task["cells"]:
"""
FAULTS = {
    "answers": "    answer(cell)",
    "killed": """
    if cell["id"] == 1:
        say({"event": "start", "id": 1}); os.kill(os.getpid(), signal.SIGKILL)
    answer(cell)""",
    "exits": """
    if cell["id"] == 1:
        say({"event": "start", "id": 1}); print("about to fail", file=sys.stderr); sys.exit(3)
    answer(cell)""",
    "exits_silently": """
    if cell["id"] == 1:
        say({"event": "start", "id": 1}); os._exit(0)
    answer(cell)""",
    "hangs": """
    if cell["id"] == 1:
        say({"event": "start", "id": 1}); time.sleep(600)
    answer(cell)""",
    "tears_a_line": """
    if cell["id"] == 1:
        say({"event": "start", "id": 1}); print('{"event": "outc', end="", flush=True); os.abort()
    answer(cell)""",
    "ends_after_each": "    answer(cell); sys.exit(7)",
}


def program(tmp_path: Path, name: str) -> tuple[str, ...]:
    path = tmp_path / f"{name}.py"
    path.write_text(HEAD + FAULTS[name])
    return (sys.executable, str(path))


def run(command: tuple[str, ...], limit_s: float = 60.0, cells: int = 3) -> list[tuple[int, dict[str, Any]]]:
    tasks = [{"id": i} for i in range(cells)]
    return [(task["id"], outcome) for task, outcome in isolate.outcomes(tasks, "cpu", limit_s, lambda _: None, command)]


def test_a_process_that_lives_serves_every_cell(tmp_path: Path) -> None:
    found = run(program(tmp_path, "answers"))
    assert [(i, outcome["status"]) for i, outcome in found] == [(0, "ok"), (1, "ok"), (2, "ok")]
    assert len({outcome["pid"] for _, outcome in found}) == 1


@pytest.mark.parametrize(
    ("fault", "limit_s", "status", "reason"),
    [
        ("killed", 60.0, "crashed", "killed by SIGKILL"),
        ("exits", 60.0, "crashed", "exit status 3 before a result: about to fail"),
        ("exits_silently", 60.0, "crashed", "exit status 0 before a result"),
        ("tears_a_line", 60.0, "crashed", "killed by SIGABRT"),
        ("hangs", 5.0, "timeout", "no result within 5 s"),
    ],
)
def test_a_fault_is_the_outcome_of_its_cell_alone(
    tmp_path: Path, fault: str, limit_s: float, status: str, reason: str
) -> None:
    found = run(program(tmp_path, fault), limit_s)
    assert [(i, outcome["status"]) for i, outcome in found] == [(0, "ok"), (1, status), (2, "ok")]
    assert found[1][1]["reason"].startswith(reason)
    assert found[0][1]["pid"] != found[2][1]["pid"]


def test_a_process_that_ends_between_cells_blames_none(tmp_path: Path) -> None:
    assert [outcome["status"] for _, outcome in run(program(tmp_path, "ends_after_each"))] == ["ok"] * 3


@pytest.mark.parametrize("command", [(sys.executable, "-c", "import no_such_module"), (sys.executable, "-c", "")])
def test_a_worker_that_never_starts_gives_every_cell_an_outcome(command: tuple[str, ...]) -> None:
    found = run(command, cells=2)
    assert [outcome["status"] for _, outcome in found] == ["crashed", "crashed"]
    with pytest.raises(isolate.WorkerError, match="exit status"):
        isolate.environments("cpu", {"cpu": ["float32"]}, 60.0, command)


def test_parts_run_at_the_same_time_and_nothing_that_happens_to_them_matters(tmp_path: Path) -> None:
    """Each part waits until all others have begun; one of them then crashes, and one hangs."""
    body = f"""
    name, here = cell["name"], {str(tmp_path)!r}
    open(here + "/pid-" + name, "w").write(str(os.getpid()))
    while len([x for x in os.listdir(here) if x.startswith("pid-")]) < 3: time.sleep(0.01)
    if name == "crashes": os.abort()
    if name == "hangs": time.sleep(600)
    answer(cell)
    open(here + "/done-" + name + ("" if task["compile_only"] else "-measured"), "w").close()"""
    path = tmp_path / "meets.py"
    path.write_text(HEAD + body)
    parts = [[{"id": 0, "name": name}] for name in ("answers", "crashes", "hangs")]
    isolate.side_by_side(parts, "cpu", 5.0, (sys.executable, str(path)))
    assert [x.name for x in tmp_path.glob("done-*")] == ["done-answers"]
    pids = [int(x.read_text()) for x in tmp_path.glob("pid-*")]
    assert len(pids) == 3 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    isolate.side_by_side([], "cpu", 5.0)


def test_leaving_early_kills_the_process(tmp_path: Path) -> None:
    tasks = [{"id": i} for i in range(2)]
    outcomes = isolate.outcomes(tasks, "cpu", 60.0, lambda _: None, program(tmp_path, "hangs"))
    _, first = next(outcomes)
    outcomes.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{first['pid']}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{first['pid']}").exists()


def test_a_spare_worker_serves_the_next_cells_and_ends_if_there_are_none(tmp_path: Path) -> None:
    """Those that misbehave, too; one that is not taken is gone when the context is left."""
    with isolate.Spare(program(tmp_path, "killed")) as spare:
        spare.start()
        spare.start()
        assert spare._child is not None
        waits = spare._child._process.pid
        tasks = [{"id": i} for i in range(3)]
        found = [outcome for _, outcome in isolate.outcomes(tasks, "cpu", 60.0, lambda _: None, spare)]
        assert [outcome["status"] for outcome in found] == ["ok", "crashed", "ok"]
        assert found[0]["pid"] == waits != found[2]["pid"]
        spare.start()
        left = spare._child._process
        assert left.poll() is None
    assert left.returncode is not None
