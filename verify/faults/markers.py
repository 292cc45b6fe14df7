"""Finds the statements of flashjvp that carry a marker, and puts a mutation in the place of one.

A marker is a comment `# mutate: name` at the end of a statement, or on a line of its own above it. It names the
statement for the mutation tests, which so do not depend on how the statement is written or where it stands. A statement
here is a logical line: of `if`, `for` and `def` the header alone.
"""

import io
import re
import tokenize
from textwrap import indent

_MARKER = re.compile(r"# mutate: (.+)")
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class MarkerError(ValueError):
    """A marker that is missing, or not the only one of its name."""


def markers(source: str) -> dict[str, tuple[int, int]]:
    """First and last line, counted from 0, of the statement of each marker."""
    found: dict[str, tuple[int, int]] = {}
    first: int | None = None
    names: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := _MARKER.fullmatch(token.string)):
            names.append(match[1])
        if token.type in _NO_CODE:
            continue
        if token.type != tokenize.NEWLINE:
            first = token.start[0] - 1 if first is None else first
            continue
        assert first is not None
        for name in names:
            if name in found:
                raise MarkerError(f"two statements are marked {name!r}")
            found[name] = first, token.start[0] - 1
        first, names = None, []
    return found


def mutated(source: str, marker: str, statement: str) -> str:
    """The source with another statement, of one or more lines, in the place of the marked one."""
    places = markers(source)
    if marker not in places:
        raise MarkerError(f"no statement is marked {marker!r}")
    first, last = places[marker]
    lines = source.splitlines(keepends=True)
    margin = re.match(r" *", lines[first])
    assert margin is not None
    lines[first : last + 1] = [indent(statement, margin[0]) + "\n"]
    return "".join(lines)
