"""The command `python -m flashjvp.check module:function`."""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._commands import BAD_USAGE, Parser
from . import table
from .diagnose import check

RIGHT, WRONG = 0, 1
START = '{\n  "ok": '  # of a file that this command wrote
STOPPED = 128 + signal.SIGINT


class _BadUsage(Exception):
    """What the user gave cannot be checked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a report. Returns 0 if the model is right, 1 if it is not; bad usage ends in 2 with one line of text."""
    parser = Parser(
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
    parser.add_argument("--json", metavar="FILE.json", help="write the report to FILE.json, too")
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            _try(given.json)
        model, inputs, tangents = _loaded(given.source)
        try:
            report = check(model, inputs, tangents, detached=given.detached, replaced=given.replaced)
        except Exception as error:  # the model may raise anything
            raise _BadUsage(f"{given.source}: {type(error).__name__}: {error}") from error
        if given.json is not None:
            _write(given.json, json.dumps(report.to_dict(), indent=2))
    except _BadUsage as error:
        if sys.flags.dev_mode:
            traceback.print_exc()
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
    except (Exception, SystemExit) as error:  # a module of the user's runs
        raise _BadUsage(f"{name}: cannot be imported: {type(error).__name__}: {error}") from error
    for attribute in function.split("."):
        if not hasattr(found, attribute):
            raise _BadUsage(f"{name}: has no function {function!r}")
        found = getattr(found, attribute)
    if not callable(found):
        raise _BadUsage(f"{source}: expected a function, got an object of type {type(found).__name__}")
    try:
        made = found()
    except (Exception, SystemExit) as error:  # a function of the user's runs
        raise _BadUsage(f"{source}: raises {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) != 3:
        came = f"{len(made)} values" if isinstance(made, tuple) else f"an object of type {type(made).__name__}"
        raise _BadUsage(f"{source}: expected it to return model, inputs and tangents, got {came}")
    return made


def _try(name: str) -> None:
    """Raises _BadUsage if no report can be written there, or something else is there."""
    path = Path(name)
    try:
        if path.suffix != ".json" or "\0" in name:
            raise _BadUsage(f"--json: expected a file that ends with .json, got {name!r}")
        if (path.exists() or path.is_symlink()) and not (
            path.is_file() and path.read_text(errors="replace")[: len(START)] in ("", START)
        ):
            raise _BadUsage(f"--json: {name} exists and was not written by this command: give another file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        raise _BadUsage(f"--json: expected a file that can be written, got {name!r}: {error}") from error


def _write(name: str, text: str) -> None:
    """Writes a report. The file appears under its name once it is complete."""
    path = Path(name)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text + "\n")
        draft.replace(path)
    except OSError as error:
        raise _BadUsage(f"--json: expected a file that can be written, got {name!r}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
