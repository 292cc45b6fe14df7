"""Loops that hand a number on from one name to another: `a = b`, where both change from turn to turn.

Triton 3.6 and 3.7 lose that where another loop is inside: they then take a for a number that never changes. The kernel
waits for ever, or its results are wrong; 3.8 and 3.9 keep it. Nothing of it shows in the compiled code, so the first
intermediate representation is read.
"""

import re


def handed_on(ir: str) -> str:
    """The loop arguments in this text of MLIR that get the value of another one of the turn before, or ''."""
    open_loops: list[tuple[int, list[str]]] = []  # indentation and arguments
    found = []
    for line in ir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if (loop := re.search(r"scf\.for .* iter_args\((.*?)\) ->", line)) is not None:
            open_loops.append((indentation, re.findall(r"(%[\w.]+) = ", loop[1])))
        elif re.search(r"scf\.for ", line) is not None:
            open_loops.append((indentation, []))
        elif open_loops and indentation == open_loops[-1][0]:
            open_loops.pop()
        elif open_loops and indentation == open_loops[-1][0] + 2 and "scf.yield" in line:
            names = open_loops[-1][1]
            values = re.findall(r"%[\w.#]+", line.split(" : ")[0])
            found += [f"{to} = {of}" for to, of in zip(names, values, strict=True) if of in names and of != to]
    return ", ".join(found)
