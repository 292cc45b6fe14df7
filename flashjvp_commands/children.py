"""The processes that a command starts: each leads a process group, and whoever ends it ends what it started."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

_LEADERS: set[int] = set()


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Starts a process, with the options of Popen, in a session of its own. Leaving the block kills its whole group."""
    process = None
    try:
        with signals_kept():
            process = subprocess.Popen(command, start_new_session=True, **options)
            register(process.pid)
        yield process
    finally:
        if process is not None:
            _LEADERS.discard(process.pid)
            _kill(process.pid, waited_for=process.returncode is not None)
            with process:  # closes its pipes and waits for it
                pass


def register(leader: int) -> None:
    """Notes a process, which leads a group or will soon, for `end_all`."""
    _LEADERS.add(leader)


def end(leader: int) -> None:
    """Kills a process that was registered, with its group. Before it is waited for: its id may then be another's."""
    _LEADERS.discard(leader)
    _kill(leader)


def forget(leader: int) -> None:
    """Takes a process off the list that was waited for."""
    _LEADERS.discard(leader)


def end_all() -> None:
    """Kills every process that is registered, with its group."""
    for leader in tuple(_LEADERS):
        _kill(leader)


def _kill(leader: int, waited_for: bool = False) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it does not lead a group yet, or its group has ended
        if not waited_for:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started in this block do not see Ctrl-C, which is for the command that started them.

    A signal to the command waits for the end of the block: a process that is half started would leave a traceback.
    """
    with signals_kept():
        resource_tracker.ensure_running()  # when multiprocessing starts it by itself, it unblocks SIGINT afterwards
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Calls Python's handlers of both signals at the end of the block: a process that was started is then registered.

    Only the main thread can see to that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers: dict[int, Any] = {}
    for stop in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(stop)):
            handlers[stop] = handler
            signal.signal(stop, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for stop_number, handler in handlers.items():
            signal.signal(stop_number, handler)
        for number in arrived:
            handlers[number](number, None)
