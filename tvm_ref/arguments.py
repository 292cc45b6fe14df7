"""What the commands share: types of arguments such as `--nfe 1,2,4`, and checks of settings."""

import contextlib
import io
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from tyro.constructors import PrimitiveConstructorSpec

from flashjvp_commands import ending, outputs
from flashjvp_commands.arguments import SEEDS, a_device_name

T = TypeVar("T")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from error


Numbers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=lambda strings: _numbers(strings[0]),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(number, int) for number in value),
        str_from_instance=lambda numbers: [",".join(str(number) for number in numbers)],
    ),
]


def parsed(parse: Callable[[], T]) -> T:
    """What `parse` makes of the command line. What is wrong with that is said in one line, with exit status 2.

    The help that tyro prints is wrapped where it is wider than the terminal.
    """
    said, helped = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(helped):
            return parse()
    except SystemExit as end:
        if end.code in (0, None):
            helped.seek(0)
            print(*map(_wrapped, helped.read().splitlines()), sep="\n")
            raise
    without_box = re.sub(r"(?m)[\u2500-\u257f]|-{4,}|^[|+]|[|+]$", " ", said.getvalue())
    text = " ".join(without_box.split())
    text = re.sub(r"For full helptext,? (?:see|run) (.*)$", r"(\1 lists what there is)", text)
    text = re.sub(
        r"^-* *(?:Value error|Parsing error|Missing argument) (?:Error parsing \S+: (?=[a-z_.]+: ))?", "", text
    )
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(ending.UNUSABLE)


def _wrapped(line: str) -> str:
    """A line of help, as several if it is too long."""
    width = shutil.get_terminal_size().columns
    if len(line) <= width:
        return line
    if line.startswith("usage:"):
        line = line.replace(",", ", ")  # names of presets, between which a line may end
        return textwrap.fill(line, width, subsequent_indent=" " * 8, break_on_hyphens=False).replace(", ", ",")
    return textwrap.fill(line, width, break_on_hyphens=False)


def check_common(*, device: str, seed: int = 0, **at_least_one: int | None) -> None:
    """Checks the device, which must be there, the seed, and counts. Raises ValueError that names the option."""
    if a_device_name(device) is None:
        raise ValueError(f"device: expected cpu, cuda, cuda:0, cuda:1, ..., got {device!r}")
    on = torch.device(device)
    if on.type == "cuda" and (on.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device} is not there: torch finds {torch.cuda.device_count()} GPUs")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed: expected a number in [0, 2^32), got {seed}")
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_guidance(w: float | None) -> None:
    """Raises ValueError for a guidance scale that is no positive, finite number."""
    if w is not None and not (math.isfinite(w) and w > 0):
        raise ValueError(f"w: expected a positive number that is finite, got {w}")


def check_out(path: Path, *endings: str) -> None:
    """Raises ValueError for a path that is neither a folder nor a file with one of these endings."""
    try:
        outputs.checked_name(path, endings)
    except outputs.OutputError as error:
        raise ValueError(f"out: {error}") from error
