"""Traces training steps with torch.profiler: where their time goes, group by group, beside what the device can do."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from reports.schema import write_rows
from reports.step_profile import PROFILE_COLUMNS, draw_profile, profile_table
from tvm_ref.training.parallel import World

from .step_trace import IDLE, STEP, Group, groups

if TYPE_CHECKING:
    from .step_row import StepRow

TRACED = 2  # steps
REPEATS = 10
SIZES = {"cuda": (8192, 2**28), "cpu": (512, 2**22)}  # of the square product, and of the numbers that are copied


class Rates(NamedTuple):
    """What the device does: bytes read and written by a copy, in TB/s, and a bfloat16 product, in TFLOP/s."""

    tbytes_per_s: float
    tflops: float


@dataclass(frozen=True)
class ProfileRow:
    """A group of a step, with the columns PROFILE_COLUMNS of reports.step_profile."""

    preset: str
    precision: str
    residual: str
    compile: str
    checkpointing: str
    cuda_graph: str
    parallel: str
    gpus: int
    batch: int
    accumulate: int
    objective: str
    detach: bool
    tokens: int
    group: str
    ms: float
    busy_ms: float
    gib: float
    tflop: float
    floor_ms: float
    kernels: float
    tbytes_per_s: float
    tflops: float
    torch: str
    device: str
    commit: str


class Profiler:
    """Traces steps of rows. Every process makes the steps; the first one traces and keeps the groups, in `rows`."""

    def __init__(self, this: World) -> None:
        self._this, self._rates = this, measured_rates(this.device) if this.first else None
        self.rows: list[ProfileRow] = []

    def trace(self, row: "StepRow", make_step: Callable[[], None]) -> None:
        """Traces some steps with the settings of `row`, which are warm."""
        if self._rates is None:
            for _ in range(TRACED):
                make_step()
            return
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._this.device.type == "cuda")
        with profile(activities=kinds, record_shapes=True, acc_events=True) as traced:
            for _ in range(TRACED):
                with record_function(STEP):
                    make_step()
                    _wait(self._this.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            traced.export_chrome_trace(str(path))
            found = _of_timed(groups(json.loads(path.read_text(errors="replace"))), row.ms_per_step)
        self.rows += [
            ProfileRow(
                preset=row.preset, precision=row.precision, residual=row.residual, compile=row.compile,
                checkpointing=row.checkpointing, cuda_graph=row.cuda_graph, parallel=row.parallel, gpus=row.gpus,
                batch=row.batch, accumulate=row.accumulate, objective=row.objective, detach=row.detach,
                tokens=row.tokens, floor_ms=group.floor_ms(*self._rates),
                **vars(group), **self._rates._asdict(), torch=row.torch, device=row.device, commit=row.commit,
            )
            for group in found
        ]  # fmt: skip
        self._of_one = len(found)

    def table(self) -> str:
        """The table of the steps that were traced last."""
        return profile_table(_frame(self.rows[-self._of_one :]))


def _of_timed(found: list[Group], ms: float) -> list[Group]:
    """The groups as parts of a step that is not traced, of `ms`: while it is, the device waits for the host."""
    busy = sum(group.ms for group in found if group.group != IDLE)
    return [replace(group, ms=max(0.0, ms - busy)) if group.group == IDLE else group for group in found]


def write_profile(path: Path, rows: list[ProfileRow]) -> None:
    """Writes the rows, and their figure beside them."""
    write_rows(path, rows, PROFILE_COLUMNS)
    draw_profile(_frame(rows), path.with_suffix(".png"))


def measured_rates(device: torch.device) -> Rates:
    """Rates of a copy and of a product, each the fastest of some."""
    side, count = SIZES[device.type]
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, y = (torch.zeros(count, device=device) for _ in range(2))
    product_s, copy_s = _seconds(lambda: torch.mm(a, b), device), _seconds(lambda: y.copy_(x), device)
    return Rates(2 * count * 4 / copy_s / 1e12, 2 * side**3 / product_s / 1e12)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _frame(rows: list[ProfileRow]) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows], columns=list(PROFILE_COLUMNS))
