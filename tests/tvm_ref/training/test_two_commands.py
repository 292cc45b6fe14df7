"""Two `tvm_ref.train` commands in one folder: one trains, the other is refused soon and changes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tvm_ref.runs import command_line
from tvm_ref.training import checkpoint


def begun(output: Path, *words: str) -> "subprocess.Popen[bytes]":
    with output.open("wb") as stream:
        return subprocess.Popen([sys.executable, *words], stdout=stream, stderr=stream)


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has, without waiting for it, which would lose its processor time."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def processor_seconds(process: "subprocess.Popen[bytes]") -> float:
    """Waits for the end."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_one_is_refused_within_five_seconds(tmp_path: Path, at_once: bool) -> None:
    """Five seconds of processor time, since the machine may be loaded, and not counting imports."""
    run = tmp_path / "run"
    words = ["-m", "tvm_ref.train", *command_line(run, steps=100_000, save_every=100_000)]
    first = begun(tmp_path / "first", *words)
    processes = [first]
    try:
        while not at_once and not (run / "metrics.csv").exists():
            assert first.poll() is None, (tmp_path / "first").read_text()
            time.sleep(0.05)
        second = begun(tmp_path / "second", *words)
        processes.append(second)
        while not has_ended(first) and not has_ended(second):
            time.sleep(0.05)
        refused, holder = (first, second) if has_ended(first) else (second, first)
        assert at_once or refused is second
        used = processor_seconds(refused)
        said = (tmp_path / ("first" if refused is first else "second")).read_text()
        assert refused.returncode == 1 and len(said.splitlines()) == 1, said
        assert f"which process {holder.pid} on " in said
        processes.append(begun(tmp_path / "imports", "-c", "import tvm_ref.train, tvm_ref.training.trainer"))
        assert used - processor_seconds(processes[-1]) < 5
        while not (run / "metrics.csv").exists():
            time.sleep(0.05)
        holder.send_signal(signal.SIGTERM)
        assert holder.wait() == 128 + signal.SIGTERM
        assert len(checkpoint.checkpoints(run / "checkpoints")) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
