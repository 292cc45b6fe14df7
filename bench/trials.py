"""The log of a search for tiles: which candidates there are, what became of each, and which of them wins."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from flashjvp.kernels import schedule
from flashjvp.kernels.schedule import Tile
from reports.schema import DamagedError, VersionError, write_rows

SCHEMA_VERSION = 1
STATUSES = ("compiled", "skipped", "ok", "wrong", "oom", "crashed", "timeout", "unsupported", "error")
# What is tried; the row sums have no key rows and nothing to pipeline.
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3)
MARGIN = 0.02  # a tile in the table stays unless another is faster by more than timings differ by chance


@dataclass(frozen=True)
class Candidate:
    """A tile tried for a kernel family at one head dim."""

    arch: str
    kind: str
    family: str
    head_dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def tile(self) -> Tile:
        return Tile(self.block_m, self.block_n, self.warps, self.stages)

    @property
    def entry(self) -> tuple[str, str, str, int]:
        """The entry of schedule.TABLES that it may replace: architecture, kind, family, largest padded head dim."""
        return self.arch, self.kind, self.family, bucket(self.arch, self.kind, self.family, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate and what became of it; None is what was not measured.

    `compiled` was not timed yet, `skipped` did not compile, does not fit or spills; `ok` was timed (percentiles over
    `repeats`); the others are those of reports.schema. `registers` and `spill_bytes` are of a thread, `shared_bytes` of
    a block, `loop_spill_share` is the share of an inner loop's instructions that touch spilled registers.
    """

    schema_version: int = SCHEMA_VERSION
    candidate: Candidate = field(metadata={"columns": tuple(x.name for x in fields(Candidate))})
    status: str
    reason: str = ""
    registers: int | None = None
    spill_bytes: int | None = None
    loop_spill_share: float | None = None
    shared_bytes: int | None = None
    latency_p20_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p80_ms: float | None = None
    repeats: int | None = None
    machine: str
    driver: str
    torch_version: str
    triton_version: str
    commit: str
    date_utc: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")


COLUMNS = tuple(name for x in fields(Trial) for name in x.metadata.get("columns", (x.name,)))


def bucket(arch: str, kind: str, family: str, head_dim: int) -> int:
    """The entry that serves a head dim: the smallest that its padded width fits. KeyError where there is none."""
    width = sum(schedule.chunk_widths(head_dim, kind))
    entries = [entry for entry in schedule.TABLES[arch][kind][family] if entry >= width]
    if not entries:
        raise KeyError(f"{family} has no tile for head dim {head_dim}")
    return min(entries)


def current(entry: tuple[str, str, str, int]) -> Tile:
    """The tile in use."""
    arch, kind, family, width = entry
    return schedule.TABLES[arch][kind][family][width]


def candidates(arch: str, kind: str, families: Sequence[str], head_dims: Sequence[int]) -> list[Candidate]:
    """Every candidate, those near the tile in use first, the families and head dims in turn; the same for each run."""
    found = []
    for family, head_dim in itertools.product(families, head_dims):
        try:
            entry = (arch, kind, family, bucket(arch, kind, family, head_dim))
        except KeyError:
            continue
        tiles = itertools.product(ROWS, *(((0,), WARPS, (1,)) if family == "rowsums" else (ROWS, WARPS, STAGES)))
        now = current(entry)
        near = sorted({now, *itertools.starmap(Tile, tiles)}, key=lambda tile: (_distance(tile, now), tile))
        found += [(i, Candidate(arch, kind, family, head_dim, *tile)) for i, tile in enumerate(near)]
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def winners(trials: Iterable[Trial]) -> dict[tuple[str, str, str, int], Tile]:
    """The tile of each entry that was timed: the fastest over all its head dims, or the one in use if nearly as fast.

    A tile counts only if it was timed at every head dim that was tried for the entry. The times of a head dim are taken
    relative to its fastest, and those of several averaged (geometric mean).
    """
    times: dict[tuple[str, str, str, int], dict[int, dict[Tile, float]]] = {}
    for trial in trials:
        at_dim = times.setdefault(trial.candidate.entry, {}).setdefault(trial.candidate.head_dim, {})
        if trial.status == "ok" and trial.latency_p50_ms is not None:
            at_dim[trial.candidate.tile] = trial.latency_p50_ms
    found = {}
    for entry, by_dim in times.items():
        tiles = sorted(set.intersection(*(set(at_dim) for at_dim in by_dim.values())))
        scores = {
            tile: sum(math.log(at_dim[tile] / min(at_dim.values())) for at_dim in by_dim.values()) / len(by_dim)
            for tile in tiles
        }
        if not scores:
            continue
        best = min(scores, key=lambda tile: scores[tile])
        now = current(entry)
        found[entry] = now if now in scores and scores[now] - scores[best] < math.log1p(MARGIN) else best
    return found


def write_trials(path: Path, trials: Iterable[Trial]) -> None:
    """Writes the whole log under a temporary name and renames it into place."""
    write_rows(path, [_Line(trial) for trial in trials], COLUMNS)


def read_trials(path: Path) -> list[Trial]:
    """The log. Raises VersionError or DamagedError, which name the line."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise DamagedError(path, 1, f"the header is not that of a log of tiles, version {SCHEMA_VERSION}")
    return [_trial(path, number, cells) for number, cells in enumerate(lines[1:], start=2)]


class _Line:
    """A trial whose variables are the columns of the log."""

    def __init__(self, trial: Trial) -> None:
        for x in fields(Trial):
            value = getattr(trial, x.name)
            vars(self).update(vars(value) if isinstance(value, Candidate) else {x.name: value})


def _trial(path: Path, line: int, cells: Sequence[str]) -> Trial:
    if len(cells) != len(COLUMNS):
        raise DamagedError(path, line, f"{len(cells)} cells, expected {len(COLUMNS)}")
    if cells[0] != str(SCHEMA_VERSION):
        raise VersionError(path, line, f"version {cells[0]}, this program reads version {SCHEMA_VERSION}")
    kinds = get_type_hints(Candidate) | get_type_hints(Trial)
    try:
        values = {name: _value(kinds[name], cell) for name, cell in zip(COLUMNS, cells, strict=True)}
        candidate = Candidate(**{x.name: values.pop(x.name) for x in fields(Candidate)})
        return Trial(candidate=candidate, **values)
    except ValueError as error:
        raise DamagedError(path, line, str(error)) from error


def _value(kind: Any, cell: str) -> Any:
    options = get_args(kind) or (kind,)
    return None if cell == "" and type(None) in options else options[0](cell)


def _distance(tile: Tile, other: Tile) -> float:
    """Steps from one tile to another: halvings of rows and warps, and stages."""
    sizes = zip(tile[:3], other[:3], strict=True)
    return sum(abs(math.log2(max(a, 1)) - math.log2(max(b, 1))) for a, b in sizes) + abs(tile.stages - other.stages)
