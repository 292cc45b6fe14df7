"""Kills a process between two changes of files, wherever a test wants."""

import os
import signal
from typing import Any

FILE_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def at_a_file_call(counter: Any, last: int) -> None:
    """Counts the calls of this process that change files, and sends SIGKILL instead of making call `last` + 1."""
    for name in FILE_CALLS:
        original = getattr(os, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            if counter.value == last:
                os.kill(os.getpid(), signal.SIGKILL)
            counter.value += 1
            return original(*args, **kwargs)

        setattr(os, name, counted)
