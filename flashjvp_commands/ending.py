"""How a command ends: with an exit status, with one line for an error, and soon after Ctrl-C or SIGTERM.

Exit status: 0, all went well; 1, the work failed or found a failure; 2, it cannot be done as asked; 128 plus the number
of a signal (130 for Ctrl-C, 143 for SIGTERM), it was stopped. `python -X dev` shows the traceback of every error.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from . import children

HELD, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 128
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 0.05  # from a Stopped that was lost to the signal that raises it again
GRACE_S = 1.0  # from the second signal to the end that nothing delays
BROKEN_PIPE = STOPPED + 13
MOST_LETTERS = 1000
# A process that passes on what it reads and acknowledges the first signal in it. C code may hold Python's lock for
# seconds, as exact transport and compilers do, and then no thread of a command runs. Python's handler in C writes on.
ACKNOWLEDGE = """
import contextlib, os, signal
said = False
while data := os.read(0, 1):
    if not said and data[0] in (signal.SIGINT, signal.SIGTERM):
        said = True
        with contextlib.suppress(OSError):
            os.write(2, f"\\n{signal.Signals(data[0]).name}: stopping; a second one stops at once\\n".encode())
    os.write(1, data)
"""
OURS = ("flashjvp", "flashjvp_commands", "tvm_ref", "verify", "bench", "reports")


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM arrived. Raised in the main thread."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stopped_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that a signal stopped."""
    return STOPPED + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def run(command: Callable[[], int | None]) -> int:
    """Runs a command as the work of this process, and returns its exit status.

    A first SIGINT or SIGTERM is acknowledged at once and raises Stopped in `command`. A second one kills all children,
    and ends the process even if it waits for something that cannot be interrupted.
    """
    _open_standard_streams()
    with _signals_watched() as arrived:
        return _flushed(status_of(lambda: arrived.raised_in(command)))


def status_of(command: Callable[[], int | None]) -> int:
    """Calls a command; an exception becomes one line on standard error and an exit status."""
    try:
        return command() or HELD
    except KeyboardInterrupt as stop:
        _say(str(stop) or "stopped by SIGINT")
        return stopped_status(stop)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or HELD
        if isinstance(end.__cause__, BrokenPipeError):
            return _nobody_reads()
        _say(str(end.code))
        return FAILED
    except BrokenPipeError:  # nobody reads on, as in `... | head`
        return _nobody_reads()
    except BaseException as error:
        if sys.flags.dev_mode:
            traceback.print_exc()
        _say(f"error: {in_one_line(error)}")
        return FAILED


def unusable(error: object) -> SystemExit:
    """Says in one line what cannot be done as asked. Returns what ends the command then, with exit status 2."""
    _say(f"error: {error}")
    return SystemExit(UNUSABLE)


def say_what_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For sys.excepthook: one line for an error outside of a command, as while PyTorch is imported."""
    if sys.flags.dev_mode:
        traceback.print_exception(kind, error, trace)
    else:
        _say(f"error: {in_one_line(error)}")


def in_one_line(error: BaseException) -> str:
    """What an error says. One that nobody expected has its type, and its traceback in a file that is named."""
    text = " ".join(str(error).split("\nException raised from")[0].split())[:MOST_LETTERS]
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, OSError | ValueError | ImportError) or type(error).__module__.split(".")[0] in OURS:
        return text or type(error).__name__
    try:
        with tempfile.NamedTemporaryFile("w", prefix="flashjvp-error-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:  # the disk is full, say
        return f"{type(error).__name__}: {text} (python -X dev shows the traceback)"
    return f"{type(error).__name__}: {text} (the traceback is in {file.name})"


def _open_standard_streams() -> None:
    """Gives a process that was started without standard streams (`>&-`) ones that go nowhere.

    What the encoding of standard output lacks is printed as "?".
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _flushed(status: int) -> int:
    """The exit status, or that of a standard output that takes nothing, such as a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as error:
        _nobody_reads()
        _say(f"error: standard output: {error}")
        return status or FAILED
    return status


def _nobody_reads() -> int:
    """Keeps Python from writing, at its end, what standard output still holds."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def printable(text: str) -> str:
    """The text with "?" for what a terminal would act upon, or cannot show, as a name of a file may have it."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


class _Arrived:
    """Raises Stopped for a signal while a command runs; one that came before is kept until then.

    Python ignores what is raised in a finaliser or a callback. Such a Stopped is lost, and the signal sent again.
    repeated: how many were.
    """

    def __init__(self) -> None:
        self._runs, self._number = False, 0
        self.repeated = 0
        self._again: list[threading.Timer] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self._runs:
            raise Stopped(number)

    @contextlib.contextmanager
    def losing_none(self) -> Iterator[None]:
        """Watches for what is ignored."""
        before = sys.unraisablehook

        def ignored(what: Any) -> None:
            if not isinstance(what.exc_value, Stopped):
                before(what)
                return
            self.repeated += 1
            # To the main thread: another one that gets it would not wake what the main thread waits for.
            to_main = (threading.main_thread().ident, what.exc_value.number)
            self._again.append(threading.Timer(AGAIN_S, signal.pthread_kill, to_main))
            self._again[-1].start()

        sys.unraisablehook = ignored
        try:
            yield
        finally:
            sys.unraisablehook = before
            for timer in self._again:
                timer.cancel()
                timer.join()

    def raised_in(self, command: Callable[[], int | None]) -> int | None:
        """Runs the command."""
        try:
            self._runs = True
            if self._number:
                raise Stopped(self._number)
            return command()
        except (Exception, SystemExit) as error:
            said = not isinstance(error, SystemExit) or isinstance(error.code, str)
            if not (self._number and said):
                raise
            raise Stopped(self._number) from error  # what was stopped halfway, such as an import, fails somehow
        finally:
            self._runs = False


@contextlib.contextmanager
def _signals_watched() -> Iterator[_Arrived]:
    """Handlers of both signals, a process that acknowledges the first, and a thread that sees to the second."""
    stop = _Arrived()
    seen, told = os.pipe()
    os.set_blocking(told, False)
    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    with _acknowledging(seen) as passed_on:
        threading.Thread(target=_watch, args=(passed_on, stop), daemon=True).start()
        try:
            with stop.losing_none():
                yield stop
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(told)


@contextlib.contextmanager
def _acknowledging(seen: int) -> Iterator[int]:
    """The end of a pipe that gives what `seen` gives, once it is acknowledged; `seen` where no process can start."""
    passed_on, passing = os.pipe()
    command = [sys.executable, "-I", "-S", "-c", ACKNOWLEDGE]
    try:  # in a session of its own, which Ctrl-C does not reach
        process = subprocess.Popen(command, stdin=seen, stdout=passing, start_new_session=True)
    except OSError:
        os.close(passed_on)
        yield seen
        return
    finally:
        os.close(passing)
    os.close(seen)
    yield passed_on
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:  # a child that outlives the command holds the pipe
        process.kill()
        process.wait()


def _watch(passed_on: int, stop: _Arrived) -> None:
    """GRACE_S after the second signal it ends the process."""
    count = 0
    while data := os.read(passed_on, 1):
        count += data[0] in SIGNALS
        if count - stop.repeated == 2:
            time.sleep(GRACE_S)
            children.end_all()
            os._exit(STOPPED + data[0])
    os.close(passed_on)
