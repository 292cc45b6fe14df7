"""The lock of a folder: one process group at a time trains in it, or computes what is kept there.

The lock is the operating system's (flock), so it ends with the process that holds it, also after kill -9, and on shared
file systems it holds across machines. `lock.json` beside it says who holds it.
"""

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from .parallel import World

LOCK, HOLDER = ".lock", ".lock.json"


class RunLockedError(RuntimeError):
    """Another process uses the folder. The message says which."""


class RunLock:
    """Held by the first process of a group, from its creation until `release`."""

    def __init__(self, folder: Path, world: World, option: str = "run.out") -> None:
        """Takes the lock of `folder`, which the first process finds there. Every process calls it.

        option: what chooses the folder, to be named in errors.

        Raises RunLockedError on every process if another group holds it. On a file system without locks it warns, and
        the folder stays unprotected.
        """
        self._option = option
        self._lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        self._holder, self._folder = folder / HOLDER, folder
        reason = self._try() if world.first else ""
        if reason := next(filter(None, world.gather(reason)), ""):
            raise RunLockedError(reason)

    def release(self) -> None:
        """Gives the lock back. May be called again, and by processes that do not hold it."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def abandon(self, made: Sequence[Path]) -> None:
        """Gives the lock back, and removes folders that were made with nothing in them.

        made: the folder of the lock, folders in it and around it, inner ones first. One with files of others stays.
        """
        self._holder.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                folder.rmdir()
        self.release()

    def _try(self) -> str:
        """Returns why the lock could not be taken, or nothing."""
        try:
            self._lock.acquire()
        except Timeout:
            return (
                f"{self._option}: expected a folder that no other run is using, got {self._folder}, which "
                f"{_who(self._holder)} is using: wait for it, stop it, or give another --{self._option}"
            )
        except NotImplementedError:
            warnings.warn(
                f"the file system of {self._folder} has no locks: make sure that no second run uses this folder",
                stacklevel=2,
            )
            return ""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        draft = self._holder.with_suffix(".draft")
        draft.write_text(json.dumps(holder))
        draft.replace(self._holder)
        return ""


def _who(path: Path) -> str:
    """Describes the holder of a lock, as far as its note can be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        holder = json.loads(path.read_text())
        return f"process {int(holder['pid'])} on {holder['host']!s} (since {holder['since']!s})"
    return "another process"
