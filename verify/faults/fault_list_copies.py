"""The planted bugs of calls on copies."""

from .fault import Fault

COPIES, ROWS = "backends/copies.py", "kernels/portable/copy_rows.py"


def _copied(name: str, file: str, marker: str, statement: str) -> Fault:
    return Fault(f"copies: {name}", "pipelines", file, marker, statement, "hopper_36", "emulated")


OF_COPIES = [
    _copied(
        "cotangent of o_t left out", COPIES, "_copy",
        "_copy(given, {name: pair for name, pair in pairs.items() if name != 'd_o_t'})",
    ),
    _copied(
        "o_t taken from o", COPIES, "pairs",
        "pairs[name] = found[name.replace('o_t', 'o')], empty_rows(like, of_width.shape[-1], x.dtype)",
    ),
    _copied(
        "the last column lost", ROWS, "tile",
        "tile = load_rows(select_head(x, batch, head, batch_shape, REGULAR), first, rows, ROWS, "
        "(COLUMNS[0] - 1, COLUMNS[1]), REGULAR)",
    ),
]  # fmt: skip
