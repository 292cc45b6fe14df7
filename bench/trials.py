"""The log of a search for tiles: which candidates there are, what became of each, and which of them wins."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from reports.schema import DamagedError, VersionError, write_rows

from .tile_table import Entry, current, entry, space

SCHEMA_VERSION = 2
STATUSES = ("compiled", "skipped", "ok", "wrong", "oom", "crashed", "timeout", "unsupported", "error")
SMALL = 6  # stages and what follows them are below, rows are above; of the numbers of warps, 4 and 8, one is
MARGIN = 0.02  # a tile in the table stays unless another is faster by more than timings differ by chance


@dataclass(frozen=True)
class Candidate:
    """A tile tried for a kernel family at one head dim: the numbers of a schedule.Tile, of a pipelines.Pipeline in the
    kinds that are tile_table.PIPELINE_KINDS."""

    arch: str
    kind: str
    family: str
    head_dim: int
    tile: tuple[int, ...]

    @property
    def entry(self) -> Entry:
        """The entry of the table that it may replace."""
        return entry(self.arch, self.kind, self.family, self.head_dim)


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


def candidates(arch: str, kind: str, families: Sequence[str], head_dims: Sequence[int]) -> list[Candidate]:
    """Every candidate, those near the tile in use first, the families and head dims in turn; the same for each run."""
    found = []
    for family, head_dim in itertools.product(families, head_dims):
        try:
            now = tuple(current(entry(arch, kind, family, head_dim)))
        except KeyError:
            continue
        near = sorted({now, *space(kind, family)}, key=lambda tile: (_distance(tile, now), tile))
        found += [(i, Candidate(arch, kind, family, head_dim, tile)) for i, tile in enumerate(near)]
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def winners(trials: Iterable[Trial]) -> dict[Entry, tuple[int, ...]]:
    """The tile of each entry that was timed: the fastest over all its head dims, or the one in use if nearly as fast.

    A tile counts only if it was timed at every head dim that was tried for the entry. The times of a head dim are taken
    relative to its fastest, and those of several averaged (geometric mean).
    """
    times: dict[Entry, dict[int, dict[tuple[int, ...], float]]] = {}
    for trial in trials:
        at_dim = times.setdefault(trial.candidate.entry, {}).setdefault(trial.candidate.head_dim, {})
        if trial.status == "ok" and trial.latency_p50_ms is not None:
            at_dim[trial.candidate.tile] = trial.latency_p50_ms
    found: dict[Entry, tuple[int, ...]] = {}
    for place, by_dim in times.items():
        tiles = sorted(set.intersection(*(set(at_dim) for at_dim in by_dim.values())))
        scores = {
            tile: sum(math.log(at_dim[tile] / min(at_dim.values())) for at_dim in by_dim.values()) / len(by_dim)
            for tile in tiles
        }
        if not scores:
            continue
        best = min(scores, key=lambda tile: scores[tile])
        now = tuple(current(place))
        found[place] = now if now in scores and scores[now] - scores[best] < math.log1p(MARGIN) else best
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
        self.tile = "x".join(map(str, trial.candidate.tile))


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
    if kind == tuple[int, ...]:
        return tuple(int(size) for size in cell.split("x"))
    options = get_args(kind) or (kind,)
    return None if cell == "" and type(None) in options else options[0](cell)


def _distance(tile: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Steps from one tile to another: halvings of large sizes, such as rows; of small ones, such as stages, by one."""
    return sum(
        abs(a - b) if max(a, b) < SMALL else abs(math.log2(max(a, 1)) - math.log2(max(b, 1)))
        for a, b in zip(tile, other, strict=True)
    )
