"""The planted bugs of calls on copies."""

from .fault import Fault

COPIES, ROWS = "backends/copies.py", "kernels/portable/copy_rows.py"


def _copied(name: str, file: str, marker: str, statement: str) -> Fault:
    return Fault(f"copies: {name}", "pipelines", file, marker, statement, "hopper_36", "emulated")


OF_COPIES = [
    _copied(
        "cotangent of o_t taken from that of o", COPIES, "found[name]",
        "found[name] = _copy(given['d_o'] if name == 'd_o_t' else x, empty_rows(x, width))",
    ),
    _copied(
        "the last column lost", ROWS, "tile",
        "tile = load_rows(source, first, M, ROWS, (COLUMNS[0] - 1, COLUMNS[1]), REGULAR)",
    ),
]  # fmt: skip
