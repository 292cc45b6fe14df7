"""The text of flashjvp/kernels/tables.py, the file that holds the tiles, which `python -m bench.tune` rewrites."""

from collections.abc import Mapping
from pathlib import Path

from flashjvp.kernels.schedule import Table, Tile

HEAD = '''"""Tiles of every kernel family; schedule.py says what they mean.

architecture -> kind of product -> family -> largest padded head dim -> query rows, key rows, warps, stages.

`python -m bench.tune` rewrites this file. Some tiles were chosen otherwise: by what `python -m verify codegen` shows of
them, and by timings outside of a search.
"""

TILES: dict[str, dict[str, dict[str, dict[int, tuple[int, int, int, int]]]]] = {
'''


def changed(
    tables: Mapping[str, Mapping[str, Table]], tiles: Mapping[tuple[str, str, str, int], Tile]
) -> dict[str, dict[str, Table]]:
    """A copy of `tables` with other tiles at (architecture, kind, family, largest padded head dim)."""
    new = {
        arch: {kind: {family: dict(entries) for family, entries in table.items()} for kind, table in kinds.items()}
        for arch, kinds in tables.items()
    }
    for (arch, kind, family, width), tile in tiles.items():
        new[arch][kind][family][width] = tile
    return new


def source(tables: Mapping[str, Mapping[str, Table]]) -> str:
    """The file's text: a line a family, families and head dims sorted, so that a change is one line of a diff."""
    lines = []
    for arch, kinds in tables.items():
        lines.append(f'    "{arch}": {{')
        for kind, table in kinds.items():
            lines.append(f'        "{kind}": {{')
            for family in sorted(table):
                tiles = ", ".join(f"{width}: {tuple(tile)}" for width, tile in sorted(table[family].items()))
                lines.append(f'            "{family}": {{{tiles}}},')
            lines.append("        },")
        lines.append("    },")
    return HEAD + "\n".join(lines) + "\n}\n"


def write(path: Path, tables: Mapping[str, Mapping[str, Table]]) -> None:
    """Writes the file under a temporary name and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(source(tables))
    temporary.replace(path)
