"""How `python -m flashjvp` and `python -m flashjvp.check` end. Neither leaves anything half-written.

Imported first of all, so that neither Ctrl-C nor an error ends in a traceback while PyTorch is imported.
"""

import contextlib
import os
import signal
import sys
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Any, NoReturn

FAILED, BAD_USAGE, NOBODY_READS = 1, 2, 128 + 13


def _say_what_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for an error outside of a command, as while PyTorch is imported. python -X dev shows the traceback."""
    if sys.flags.dev_mode:
        sys.__excepthook__(kind, error, trace)
    else:
        named = "" if isinstance(error, ImportError | OSError) else f"{kind.__name__}: "
        print(f"error: {named}{' '.join(str(error).split())}", file=sys.stderr)


_modules = [word for option, word in pairwise(sys.orig_argv) if option == "-m"]
if sys.argv[:1] == ["-m"] and _modules[:1] in (["flashjvp"], ["flashjvp.check"]):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _say_what_ended


class Parser(ArgumentParser):
    """A parser whose errors are one line. An option with a value may be given once; argparse takes the last one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("action", None, _Once)

    def print_help(self, file: Any = None) -> None:
        """Prints the help. Raises OSError where it cannot be written, which argparse itself hides."""
        stream = file or sys.stdout
        if stream is not None:  # None: Python was started without one
            stream.write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the command line, with exit status 2."""
        self.exit(BAD_USAGE, f"error: {' '.join(message.split())} ({self.prog} --help lists the options)\n")


class _Once(Action):
    """Stores the value of an option, but not a second one."""

    _filled: Namespace | None = None

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        if option is not None and self._filled is namespace:
            raise ArgumentError(self, "given twice: expected it once")
        self._filled = namespace
        setattr(namespace, self.dest, values)


def ended(main: Callable[[], int]) -> int:
    """Runs a command. Returns its exit status, or one that says that standard output could not be written to."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # what rich makes of one
            raise
        return _silenced(NOBODY_READS)
    except BrokenPipeError:
        return _silenced(NOBODY_READS)
    except OSError as error:
        print(f"error: standard output: {error}", file=sys.stderr)
        return _silenced(FAILED)


def _silenced(status: int) -> int:
    """Keeps Python from writing, at its end, what standard output still holds."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
