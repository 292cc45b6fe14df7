"""The command `python -m flashjvp.check module:function`."""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TextIO

from ..errors import FlashJVPError
from . import table
from .diagnose import check

RIGHT, WRONG, BAD_USAGE = 0, 1, 2
STOPPED = 128 + signal.SIGINT


class _BadUsage(Exception):
    """What the user gave cannot be checked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a report. Returns 0 if the model is right, 1 if it is not; bad usage ends in 2 with one line of text."""
    parser = argparse.ArgumentParser(
        prog="python -m flashjvp.check",
        description="Whether a model is right, and fast, under a JVP and a backward pass through it. Exit code: 0 "
        "right, 1 not right, 2 bad usage.",
    )
    parser.add_argument(
        "source", metavar="module:function",
        help="a function without arguments that returns model, inputs and tangents, as flashjvp.check takes them",
    )  # fmt: skip
    parser.add_argument("--detached", action="store_true", help="the loss detaches the tangent (MeanFlow)")
    parser.add_argument("--replaced", action="store_true", help="check within flashjvp.replaced(model), too")
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE, too")
    given = parser.parse_args(arguments)
    try:
        model, inputs, tangents = _loaded(given.source)
        with _written(given.json) if given.json else nullcontext() as file:
            try:
                report = check(model, inputs, tangents, detached=given.detached, replaced=given.replaced)
            except FlashJVPError as error:
                raise _BadUsage(str(error)) from error
            if file is not None:
                file.write(json.dumps(report.to_dict(), indent=2) + "\n")
    except _BadUsage as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return STOPPED
    table.show(report)
    return RIGHT if report.ok else WRONG


def _loaded(source: str) -> tuple[Any, Any, Any]:
    """What the function returns. Modules are found as `python -m` finds them, from the current folder on."""
    name, colon, function = source.partition(":")
    if not (name and colon and function):
        raise _BadUsage(f"module:function: expected two names with a colon between them, got {source!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a module of the user's runs
        raise _BadUsage(f"{name}: cannot be imported: {type(error).__name__}: {error}") from error
    for attribute in function.split("."):
        if not hasattr(found, attribute):
            raise _BadUsage(f"{name}: has no function {function!r}")
        found = getattr(found, attribute)
    if not callable(found):
        raise _BadUsage(f"{source}: expected a function, got an object of type {type(found).__name__}")
    try:
        made = found()
    except Exception as error:  # a function of the user's runs
        raise _BadUsage(f"{source}: raises {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) != 3:
        came = f"{len(made)} values" if isinstance(made, tuple) else f"an object of type {type(made).__name__}"
        raise _BadUsage(f"{source}: expected it to return model, inputs and tangents, got {came}")
    return made


@contextmanager
def _written(path: str) -> Iterator[TextIO]:
    """A file that takes its name once it is whole, and that is known to be writable before the work begins."""
    if not path.endswith(".json") or os.path.isdir(path):
        raise _BadUsage(f"--json: expected the name of a file that ends in .json, got {path!r}")
    draft = f"{path}.draft"
    try:
        with open(draft, "w") as file:
            yield file
        os.replace(draft, path)
    except OSError as error:
        raise _BadUsage(f"--json: expected a file that can be written, got {path!r}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.remove(draft)
