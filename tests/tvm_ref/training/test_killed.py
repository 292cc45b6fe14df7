"""Two processes that are killed (-9) at random points go on bit for bit: training, saving, grids and the evaluation."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tvm_ref.runs import PATIENCE_SECONDS, command_line, launch
from tests.tvm_ref.training.test_reliability import run_command
from tvm_ref.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[3]
RANDOM_WAIT_SECONDS = 0.5
EVALUATION_SECONDS = 4.0
EVERY = 2  # steps between rows


class Group:
    """Two processes of one run, and torchrun above them if it started them."""

    def __init__(self, pids: Callable[[], list[int]], ended: Callable[[], bool]) -> None:
        self._pids, self.ended = pids, ended

    def kill(self, choice: random.Random) -> None:
        """Kills one of the two, or everything at once, and waits until nothing is left."""
        pids = self._pids()
        if choice.random() < 0.5 and len(pids) > 1:
            _kill(pids[-1 - choice.randrange(2)])
            deadline = time.monotonic() + 2  # the other one sees it, or it is killed, too
            while not self.ended() and time.monotonic() < deadline:
                time.sleep(0.01)
        while not self.ended() or (self._pids() and any(map(_is_alive, pids))):
            for pid in dict.fromkeys([*pids, *self._pids()]):
                _kill(pid)
            time.sleep(0.01)


Start = Callable[[Sequence[str], Path], Group]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def forked(arguments: Sequence[str], _: Path) -> Group:
    """Children of the server of tests/tvm_ref/runs.py, which start quickly."""
    ranks = launch(2, run_command, list(arguments))
    return Group(
        lambda: [rank.pid for rank in ranks if rank.pid is not None and rank.is_alive()],
        lambda: not any(rank.is_alive() for rank in ranks),
    )


def torchrun(arguments: Sequence[str], output: Path) -> Group:
    """`torchrun --standalone --nproc-per-node 2 -m tvm_ref.train ...`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tvm_ref.train"]
    with output.open("a") as file:
        run = subprocess.Popen(
            [sys.executable, *launcher, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    known: set[int] = set()

    def pids() -> list[int]:
        known.update(_children(run.pid))
        return [run.pid] * (run.poll() is None) + sorted(filter(_is_alive, known))

    return Group(pids, lambda: run.poll() is not None and not pids())


def settings(out: Path, steps: int, parallel: str, evaluation: bool) -> list[str]:
    words = command_line(
        out, steps=steps, save_every=5, sample_every=6, parallel=parallel, log_norms=3, loss_bins=3, log_every=EVERY
    )
    more = "--run.async-checkpoints --ema.sigma-rels 0.05,0.1 --ema.every 5 --ema.precision float32"
    return [word for word in words if word != "--run.no-evaluate" or not evaluation] + more.split()


def steps_made(out: Path) -> int:
    """So far, as metrics.csv says."""
    try:
        return EVERY * max(0, (out / "metrics.csv").read_text().count("\n") - 1)
    except FileNotFoundError:
        return 0


def wait_for(out: Path, group: Group, count: int) -> None:
    """Until so many steps are made, or the run has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while steps_made(out) < count and not group.ended():
        assert time.monotonic() < deadline, f"{steps_made(out)} of {count} steps"
        time.sleep(0.002)


def finish(start: Start, arguments: Sequence[str], output: Path) -> None:
    group = start(arguments, output)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not group.ended():
        if time.monotonic() > deadline:
            group.kill(random.Random())
            raise AssertionError("the run hangs")
        time.sleep(0.05)


def contents(out: Path) -> dict[str, object]:
    """What must be equal: logs, grids, figures, and all tensors that are stored."""
    texts = {
        str(path.relative_to(out)): path.read_bytes()
        for pattern in ("*.csv", "summary.json", "samples/*.png")
        for path in out.glob(pattern)
    }
    newest = checkpoints(out / "checkpoints")[-1]
    files = [*newest.glob("*.safetensors"), *out.glob("ema/step-*.safetensors")]
    return texts | {str(path.relative_to(out)): load_file(path) for path in files}


def check(tmp_path: Path, start: Start, *, points: int, steps: int, parallel: str, evaluation: bool) -> None:
    """Compares an undisturbed run with one that was killed at so many points."""
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    choice = random.Random(seed)
    output = tmp_path / "output"
    finish(start, settings(tmp_path / "whole", steps, parallel, evaluation), output)
    broken = tmp_path / "broken"
    # One in five kills comes after the last step, in the evaluation.
    when = sorted(choice.randrange(1, steps + steps // 4) for _ in range(points))
    for count in when:
        group = start(settings(broken, steps, parallel, evaluation), output)
        wait_for(broken, group, min(count, steps))
        time.sleep(choice.uniform(0, EVALUATION_SECONDS if count >= steps else RANDOM_WAIT_SECONDS))
        group.kill(choice)
    finish(start, settings(broken, steps, parallel, evaluation), output)
    one, other = contents(tmp_path / "whole"), contents(broken)
    assert one.keys() == other.keys(), output.read_text() if output.exists() else ""
    assert {"metrics.csv", "norms.csv", "loss_by_t.csv"} <= one.keys() and evaluation == ("summary.json" in one)
    for name, expected in one.items():
        found = other[name]
        if isinstance(expected, dict) and isinstance(found, dict):
            assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
        else:
            assert found == expected, name


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_killed_at_a_point(tmp_path: Path, parallel: str) -> None:
    check(tmp_path, forked, points=1, steps=8, parallel=parallel, evaluation=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes of torchrun in /proc")
def test_two_processes_of_torchrun_killed_at_twenty_points(tmp_path: Path) -> None:
    check(tmp_path, torchrun, points=20, steps=80, parallel="ddp", evaluation=True)
