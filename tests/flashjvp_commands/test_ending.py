"""How a command ends: the exit status of whatever it does, and of a signal at any moment, also between its parts."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashjvp_commands import children, ending

ROOT = Path(__file__).resolve().parents[2]


class LibraryError(Exception):
    """Nobody expects it."""


def fails(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("of a\nvalue"), 1, "error: of a value"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'"),
        (MemoryError(), 1, "error: out of memory"),
        (LibraryError("odd"), 1, "LibraryError: odd (the traceback is in "),
        (SystemExit("said"), 1, "said"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
        (ending.Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "_nobody_reads", lambda: ending.BROKEN_PIPE)  # standard output is pytest's
    assert ending.status_of(lambda: fails(error)) == status
    shown = capfd.readouterr().err
    assert said in shown and len(shown.splitlines()) <= 1


def test_a_name_cannot_act_upon_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert ending.status_of(lambda: fails(ValueError("a\x1b[2J\0\u202e.png"))) == 1
    assert capfd.readouterr().err == "error: a?[2J??.png\n"


def ended(script: str, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script around ending.run in a process of its own."""
    start = "import os, signal, sys, time\nfrom flashjvp_commands import ending\n"
    command = [sys.executable, *options, "-c", start + script]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_what_the_encoding_of_the_output_lacks_is_no_error() -> None:
    done = ended("ending.run(lambda: print('w \\u2022 1'))", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("w ? 1\n", "")


@pytest.mark.parametrize("error", ["ImportError('no such')", "RuntimeError('odd')"])
def test_an_error_outside_of_a_command_is_one_line(error: str) -> None:
    """As while a command's modules are imported."""
    script = f"sys.excepthook = ending.say_what_ended\nraise {error}"
    done, verbose = ended(script), ended(script, "-X", "dev")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" in verbose.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_handlers_are_made_is_kept(number: int) -> None:
    """It comes while the thread is started, before the command runs."""
    done = ended(f"""
import threading
start = threading.Thread.start
threading.Thread.start = lambda self: (os.kill(os.getpid(), {number}), start(self))
sys.exit(ending.run(lambda: print("ran")))
""")
    assert (done.returncode, done.stdout) == (128 + number, ""), done
    assert "Traceback" not in done.stderr


def test_a_signal_after_the_work_changes_nothing() -> None:
    done = ended("""
flushed = ending._flushed
ending._flushed = lambda status: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1), flushed(status))[-1]
sys.exit(ending.run(lambda: 0))
""")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("error", ["RuntimeError('odd')", "SystemExit('error: odd')"])
def test_what_a_signal_breaks_halfway_is_stopped_not_failed(error: str) -> None:
    """A library that makes another error of it, and a command that says that."""
    done = ended(f"""
def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
    except BaseException:
        pass
    raise {error}
sys.exit(ending.run(work))
""")
    assert done.returncode == 143 and "odd" not in done.stderr, done


def test_a_command_that_ends_with_a_status_of_its_own_keeps_it() -> None:
    done = ended("""
def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
    except BaseException:
        raise SystemExit(3)
sys.exit(ending.run(work))
""")
    assert done.returncode == 3, done


def test_a_second_signal_ends_what_cannot_be_interrupted() -> None:
    done = ended("""
def work():
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        except KeyboardInterrupt: pass
        time.sleep(0.2)
    while True:
        try: time.sleep(60)
        except KeyboardInterrupt: pass
sys.exit(ending.run(work))
""")
    assert done.returncode == 130 and "a second one stops at once" in done.stderr, done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_a_signal_that_arrives_in_a_finaliser_is_not_lost(number: signal.Signals) -> None:
    script = f"""
class Kept:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        for _ in range(100): pass
        print("finalised")

def command():
    Kept()
    try:
        time.sleep(60)
    finally:
        time.sleep(2 * ending.GRACE_S)  # the signal that is sent again is no second one
        print("kept")
sys.exit(ending.run(command))
"""
    began = time.monotonic()
    done = ended(script)
    assert (done.returncode, done.stdout) == (128 + number, "kept\n"), done.stderr
    assert time.monotonic() - began < 30  # it does not sleep on
    assert "Exception ignored" not in done.stderr and done.stderr.count("stopping") == 1


def test_a_signal_while_a_process_starts_leaves_none_behind() -> None:
    script = """
import subprocess
from flashjvp_commands import children

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100): pass

def command():
    children.subprocess.Popen = Interrupted
    with children.child(["sleep", "60"]):
        time.sleep(60)
sys.exit(ending.run(command))
"""
    done = ended(script)
    assert done.returncode == 128 + signal.SIGTERM, done
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_signal_is_acknowledged_while_c_code_holds_pythons_lock() -> None:
    script = """
import ctypes, os, signal, sys
from flashjvp_commands import children, ending
seen, told = os.pipe()
def work():
    signal.siginterrupt(signal.SIGINT, False)  # the system goes on with the call
    print("ready", flush=True)
    ctypes.PyDLL(None).read(seen, ctypes.create_string_buffer(1), 1)  # for ever
sys.exit(ending.run(work))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert select.select([process.stderr], [], [], 60)[0]
            assert b"SIGINT: stopping" in os.read(process.stderr.fileno(), 100)
            assert process.poll() is None
        finally:
            process.kill()


def test_without_a_process_that_acknowledges_signals_a_command_runs() -> None:
    done = ended("""
def refused(*words, **options): raise BlockingIOError("no more processes")
ending.subprocess.Popen = refused
def work():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(ending.run(work))
""")
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize("how", ["> /dev/full", ">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_standard_streams_that_take_nothing(how: str) -> None:
    script = "import sys; from flashjvp_commands import ending; sys.exit(ending.run(lambda: print('x')))"
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {how}', sys.executable, script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (1 if "full" in how else 0), done
    assert len(done.stderr.splitlines()) == ("full" in how) and "ignored" not in done.stderr


def test_no_file_is_opened_in_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what is printed would be written into it."""
    script = (
        "import sys; from flashjvp_commands import ending\n"
        f"def work():\n    file = open({str(tmp_path / 'file')!r}, 'w'); print('printed'); file.write('mine')\n"
        "sys.exit(ending.run(work))"
    )
    subprocess.run(["bash", "-c", '"$0" -c "$1" >&-', sys.executable, script], cwd=ROOT, check=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unexpected_error_on_a_full_disk_is_one_line() -> None:
    """There is no room for its traceback."""
    done = ended("""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
def work(): raise LookupError("odd")
sys.exit(ending.run(work))
""")
    assert done.returncode == 1, done
    assert "LookupError: odd" in done.stderr and len(done.stderr.splitlines()) == 1, done


def test_dev_mode_prints_the_traceback() -> None:
    script = "def work(): raise ValueError('why')\nsys.exit(ending.run(work))"
    assert "Traceback" not in ended(script).stderr
    assert "Traceback" in ended(script, "-X", "dev").stderr
    assert os.environ.get("PYTHONDEVMODE") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_waits_until_a_process_is_started(number: signal.Signals) -> None:
    def command() -> None:
        with children.without_interrupts():
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # in which a handler of Python's would run
            started.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        started.append("not reached")

    started: list[object] = []
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ending.Stopped), ending._signals_watched() as stop:
        stop.raised_in(command)
    assert started == [{signal.SIGINT}]
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
