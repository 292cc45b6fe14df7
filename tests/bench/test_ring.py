"""The benchmark of one sequence on several devices: it runs with one process and with two, and plans without any."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import ring, ring_plan

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_one_process_alone(tmp_path: Path) -> None:
    assert ring.main(["--preset", "quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path / "ring.csv")
    assert [(row["how"], row["mode"]) for row in found] == [
        (how, mode) for how in ring.HOW for mode in ("fwd", "bwd", "fwd+bwd")
    ]
    assert {row["gpus"] for row in found} == {"1"} and all(float(row["ms"]) > 0 for row in found)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "bench.ring",
    ]
    done = subprocess.run(
        [*command, "--preset", "quick", "--device", "cpu", "--out", str(tmp_path)], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["gpus"] for row in rows(tmp_path / "ring.csv")} == {"2"}


def test_the_ways_asked_for_alone_come_the_longest_first() -> None:
    found = [(how, case.queries, case.causal) for how, case in ring.plan("ring", "bfloat16", ("zigzag",))]
    assert found == [("zigzag", tokens, True) for tokens in (32768, 32768, 8192) for _ in range(3)]


def test_a_plan_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """4 GPUs with 1000 tokens each, one head of 100: 10^5 numbers a tensor and GPU."""
    rates = ring_plan.Rates(forward=1.2e12, backward=3e12, link=8e9, memory=76e9)
    found = ring_plan.ring("bwd", 4000, 4, 1, 100, rates)
    step, message, last, passes = 1e-3, 0.2e-3, 0.1e-3, 4 * 0.1e-3
    assert message < step
    assert found.sent_bytes == 8 * 3 * 2e5
    assert found.seconds == pytest.approx(4 * step + last + passes)
    assert found.efficiency == pytest.approx(4 * step / found.seconds)
    slow = ring_plan.ring("bwd", 4000, 4, 1, 100, ring_plan.Rates(1.2e12, 3e12, 8e8, 76e9))
    assert slow.seconds == pytest.approx(3 * 10 * message + step + 10 * last + passes)
    exchanged = ring_plan.ulysses("fwd", 4000, 4, 1, 100, rates)
    assert exchanged.sent_bytes == 8 * 2e5 * 3 / 4
    assert exchanged.seconds == pytest.approx(4e-3 + exchanged.sent_bytes / 8e9)
    assert ring.main(["--plan", "--tokens", "4096", "--gpus", "1,2"]) == 0
    first = capsys.readouterr().out.splitlines()[2]
    assert first == "| 4096 | 1 | 100 %, 0.00 GB | 100 %, 0.00 GB | 100 %, 0.00 GB | 100 %, 0.00 GB |"


@pytest.mark.parametrize("words", [["--rates", "1,2"], ["--out", "rows.txt"], ["--tokens", "0"]])
def test_bad_options_end_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ring.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]
