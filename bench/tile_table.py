"""The two tables that `python -m bench.tune` searches and rewrites: what they hold, what may be tried, their files.

tables.py has the tiles of the portable kernels, by the input precision; hopper_tables.py those of the
warp-specialised ones, with `tangents` or `plain`, all for products of half types.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from flashjvp.kernels.launch import schedule
from flashjvp.kernels.launch.hopper_tables import PIPELINES, Families, Pipeline
from flashjvp.kernels.launch.schedule import TABLES, Table, Tile

# Architecture, kind, family and padded head dim: in tables.py the largest that the tile serves.
Entry = tuple[str, str, str, int]
Widths = dict[int, dict[str, Families]]

KERNELS = Path(schedule.__file__).parent
PRODUCTS = ("half", "tf32", "bf16x6", "ieee")
PIPELINE_KINDS = ("tangents", "plain")
KINDS = (*PRODUCTS, *PIPELINE_KINDS)
# What is tried. The backward preprocess has no key rows and nothing to pipeline.
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3)
BLOCK_ROWS, PIPELINE_STAGES = (32, 64, 128), (2, 3, 4, 5)
# How many resident tiles a kernel can keep in registers; without tangents 2 at most.
REGISTER_OPERANDS = {"forward": 2, "backward_key": 3, "backward_dq_accum": 3, "backward_query": 3}
SUB_TILES, BUFFER_STAGES = {"backward_key": (1, 2), "backward_dq_accum": (1, 2)}, {"backward_dq_accum": (1, 2)}

HEAD = '''"""Tiles of every kernel family; schedule.py says what they mean.

architecture -> input precision -> family -> largest padded head dim -> query rows, key rows, warps, stages.

`python -m bench.tune` rewrites this file. Some tiles were chosen otherwise: by what `python -m verify codegen` shows of
them, and by timings outside of a search.
"""

TILES: dict[str, dict[str, dict[str, dict[int, tuple[int, int, int, int]]]]] = {
'''
LINE_LENGTH = 120
PIPELINES_BEGIN = "PIPELINES: "  # the assignment that ends hopper_tables.py; what stands before it is kept


def families(arch: str, kind: str) -> list[str]:
    """The kernel families that have a tile of a kind."""
    if kind in PRODUCTS:
        return list(TABLES[arch].get(kind, {}))
    tables = PIPELINES.get(arch, {}).values()
    return list(dict.fromkeys(family for table in tables for family in table.get(kind, {})))


def entry(arch: str, kind: str, family: str, head_dim: int) -> Entry:
    """The entry that serves a head dim. KeyError where there is none."""
    width = sum(schedule.chunk_widths(head_dim, kind)) if kind in PRODUCTS else schedule.padded_width(head_dim)
    if kind in PRODUCTS:
        widths = [found for found in TABLES[arch][kind][family] if found >= width]
    else:
        widths = [width] if family in PIPELINES.get(arch, {}).get(width, {}).get(kind, {}) else []
    if not widths:
        raise KeyError(f"{family} has no {kind} tile for head dim {head_dim}")
    return arch, kind, family, min(widths)


def current(entry: Entry) -> Tile | Pipeline:
    """The tile in use."""
    arch, kind, family, width = entry
    return TABLES[arch][kind][family][width] if kind in PRODUCTS else PIPELINES[arch][width][kind][family]


def space(kind: str, family: str) -> Iterable[tuple[int, ...]]:
    """The tiles that are tried for a family."""
    if kind in PIPELINE_KINDS:
        in_registers = range(min(REGISTER_OPERANDS.get(family, 0), 3 if kind == "tangents" else 2) + 1)
        pieces = SUB_TILES.get(family, (1,)), BUFFER_STAGES.get(family, (0,))
        return itertools.product(BLOCK_ROWS, PIPELINE_STAGES, in_registers, *pieces)
    return itertools.product(ROWS, *(((0,), WARPS, (1,)) if family == "backward_preprocess" else (ROWS, WARPS, STAGES)))


def changed(
    tables: Mapping[str, Mapping[str, Table]], tiles: Mapping[Entry, tuple[int, ...]]
) -> dict[str, dict[str, Table]]:
    """A copy of `tables`, in the form of schedule.TABLES, with other tiles at some entries."""
    new = {
        arch: {kind: {family: dict(entries) for family, entries in table.items()} for kind, table in kinds.items()}
        for arch, kinds in tables.items()
    }
    for (arch, kind, family, width), tile in tiles.items():
        new[arch][kind][family][width] = Tile(*tile)
    return new


def changed_pipelines(tables: Mapping[str, Widths], tiles: Mapping[Entry, tuple[int, ...]]) -> dict[str, Widths]:
    """A copy of `tables`, in the form of pipelines.PIPELINES, with other tiles at some entries."""
    new = {
        arch: {width: {kind: dict(found) for kind, found in kinds.items()} for width, kinds in widths.items()}
        for arch, widths in tables.items()
    }
    for (arch, kind, family, width), tile in tiles.items():
        new[arch][width][kind][family] = Pipeline(*tile)
    return new


def source(tables: Mapping[str, Mapping[str, Table]]) -> str:
    """The text of tables.py: a line a family or a tile, families and head dims sorted, so that a diff is short."""
    lines = []
    for arch, kinds in tables.items():
        lines.append(f'    "{arch}": {{')
        for kind, table in kinds.items():
            lines.append(f'        "{kind}": {{')
            for family in sorted(table):
                tiles = [f"{width}: {tuple(tile)}" for width, tile in sorted(table[family].items())]
                line = f'            "{family}": {{{", ".join(tiles)}}},'
                broken = (
                    f'            "{family}": {{',
                    *(f"                {tile}," for tile in tiles),
                    "            },",
                )
                lines += [line] if len(line) <= LINE_LENGTH else broken
            lines.append("        },")
        lines.append("    },")
    return HEAD + "\n".join(lines) + "\n}\n"


def pipelines_source(tables: Mapping[str, Widths]) -> str:
    """The text of hopper_tables.py: a line a family, all but the table as it is."""
    kept, begin, table = (KERNELS / "hopper_tables.py").read_text().partition(f"\n{PIPELINES_BEGIN}")
    return f"{kept}{begin}{table.partition(' = ')[0]} = {_literal(tables)}\n"


def is_table(path: Path) -> bool:
    """Whether a file is one of these tables, which may be written anew."""
    text = path.read_text(errors="replace")
    return text.startswith('"""') and ("\nTILES: " in text or f"\n{PIPELINES_BEGIN}" in text)


def write(path: Path, kind: str, tiles: Mapping[Entry, tuple[int, ...]]) -> None:
    """Writes the table of a kind with other tiles, under a temporary name that is renamed into place."""
    text = source(changed(TABLES, tiles)) if kind in PRODUCTS else pipelines_source(changed_pipelines(PIPELINES, tiles))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _literal(value: object, indent: str = "") -> str:
    """Nested dictionaries of pipelines, a line an item, as ruff formats them."""
    if isinstance(value, Pipeline):
        names = [name for name, default in Pipeline._field_defaults.items() if getattr(value, name) != default]
        positional = [str(x) for x in value[: len(value) - len(Pipeline._field_defaults)]]
        return f"Pipeline({', '.join(positional + [f'{name}={getattr(value, name)}' for name in names])})"
    if not isinstance(value, Mapping):
        raise TypeError(f"hopper_tables.py holds dictionaries and Pipelines, not {value!r}")
    keys = [(f'"{key}"' if isinstance(key, str) else str(key), item) for key, item in value.items()]
    lines = [f"{indent}    {key}: {_literal(item, indent + '    ')},\n" for key, item in keys]
    return "{\n" + "".join(lines) + indent + "}"
