"""What the commands share: types of arguments such as `--nfe 1,2,4`, and checks of settings."""

import contextlib
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from flashjvp_commands import ending, outputs
from flashjvp_commands.arguments import GIVEN_TWICE, MOST, SEEDS, a_device_name
from flashjvp_commands.entry import program

T = TypeVar("T")
NARROWEST = 20  # columns that tyro can print help into; it takes forever with one


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


def parsed(kind: type[T], module: str, arguments: Sequence[str] | None) -> T:
    """The settings of the command in `module`, a dataclass, from the command line: as `parsed_by`. None are empty."""

    def parse(words: Sequence[str]) -> T:
        for before, word in zip(["", *words], words, strict=False):
            if not word.strip() or (word.startswith("--") and word.endswith("=")):
                name = word.rstrip("=") or (before if before.startswith("--") else "an argument")
                raise SystemExit(f"{name}: expected a value, got nothing")
        return tyro.cli(kind, prog=program(module), args=words)

    return parsed_by(parse, arguments)


def parsed_by(parse: Callable[[Sequence[str]], T], arguments: Sequence[str] | None) -> T:
    """What `parse` makes of the command line. What is wrong with that is said in one line, with exit status 2.

    An option that is given twice is refused, of which tyro would take the last. The help that tyro prints is wrapped
    where it is wider than the terminal. arguments: None means those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = [_name(word) for word in words if word.startswith("--") and word != "--help"]
    if again := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ending.unusable(f"{again[0]}: {GIVEN_TWICE}")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    said, helped = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="replace")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(helped):
            return parse(words)
    except SystemExit as end:
        if end.code in (0, None):
            helped.seek(0)
            print(*map(_wrapped, helped.read().splitlines()), sep="\n")
            raise
        if isinstance(end.code, str):
            said.write(end.code)
    without_box = re.sub(r"(?m)[\u2500-\u257f]|-{4,}|^[|+]|[|+]$", " ", said.getvalue())
    text = " ".join(without_box.split())
    text = re.sub(r"For full helptext,? (?:see|run:?) (.*)$", r"(\1 lists what there is)", text)
    text = re.sub(r"\[/?bold\]", "", text)
    text = re.sub(r"^-* *(?:Value error|Parsing error|Missing argument|Required options) ", "", text)
    text = re.sub(r" Got errors: - <class 'NoneType'>: \[.*?\] does not match choices \('None',\) -", "", text)
    text = re.sub(r" (?:typing\.Annotated|tuple)\[.*?\]: (?=\w)", " ", text)  # names of Python's types
    text = re.sub(r"no type matching (.*?) could be instantiated from", r"expected \1, got", text)
    text = re.sub(r"^Error parsing (?:__tyro\S*: |\S+: (?=[a-z_.]+: ))", "", text)
    text = re.sub(r" Argument helptext: .*?(?= \([^()]* --help lists|$)", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10:", "expected a whole number, got", text)
    text = re.sub(r"could not convert string to float:", "expected a number, got", text)
    text = re.sub(r"^Error parsing (?=--\S+: )", "", text)
    text = re.sub(r"(?i)^([a-z ]+?):? \1", r"\1", text)  # a heading that the text repeats
    text = re.sub(r"(Unrecognized options:) (?=\(|Available)", r"\1 '' ", text)
    raise ending.unusable(text)


def _name(word: str) -> str:
    """The option in a word of the command line, as it is listed: "--run.evaluate" for "--run.no_evaluate=..."."""
    return re.sub(r"(^--|\.)no-", r"\1", word.partition("=")[0].replace("_", "-"))


def _wrapped(line: str) -> str:
    """A line of help, as several if it is too long."""
    width = shutil.get_terminal_size().columns
    if len(line) <= width:
        return line
    if line.startswith("usage:"):
        line = line.replace(",", ", ")  # names of presets, between which a line may end
        return textwrap.fill(line, width, subsequent_indent=" " * 8, break_on_hyphens=False).replace(", ", ",")
    return textwrap.fill(line, width, break_on_hyphens=False)


def check_common(*, device: str, seed: int = 0, **counts: int | None) -> None:
    """Checks the device, which must be there, the seed, and counts. Raises ValueError that names the option.

    counts: None, or from 1 to `MOST`.
    """
    if a_device_name(device) is None:
        raise ValueError(f"device: expected cpu, cuda, cuda:0, cuda:1, ..., got {device!r}")
    on = torch.device(device)
    if on.type == "cuda" and (on.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device} is not there: torch finds {torch.cuda.device_count()} GPUs")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed: expected a number in [0, 2^32), got {seed}")
    for name, value in counts.items():
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{name}: expected {'at least 1' if value < 1 else f'at most {MOST}'}, got {value}")


def check_guidance(w: float | None) -> None:
    """Raises ValueError for a guidance scale that is no positive, finite number."""
    if w is not None and not (math.isfinite(w) and w > 0):
        raise ValueError(f"w: expected a positive number that is finite, got {w}")


def check_out(path: Path, *endings: str, option: str = "out") -> None:
    """Raises ValueError for a path that is neither a folder nor a file with one of these endings."""
    try:
        outputs.checked_name(path, endings)
    except outputs.OutputError as error:
        raise ValueError(f"{option}: {error}") from error
