"""A row of `bench.train_step`: a setting, and what a training step takes with it."""

from dataclasses import dataclass

from torch._dynamo.utils import counters


@dataclass(frozen=True)
class StepRow:
    """One row of the CSV, with the columns STEP_COLUMNS of reports.training_tables.

    Whose step it is, and its settings; ms, images/s and GiB (the largest peak of all processes, above what was in
    memory before); then seconds to build the state, for the first and for the second step, and how many graphs the
    first process compiled in these, in place of finding them in inductor's cache on disk.
    """

    trainer: str
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
    ms_per_step: float
    ms_fastest: float
    ms_slowest: float
    images_per_s: float
    peak_gib: float
    reserved_gib: float
    build_s: float
    first_step_s: float
    second_step_s: float
    graphs_compiled: int
    parameters: int
    tokens: int
    loss: float
    gradient_norm: float
    torch: str
    device: str
    commit: str


def graphs_compiled() -> int:
    """How many graphs inductor has compiled in this process, those of its cache not counted."""
    return sum(counters["inductor"][name] for name in ("fxgraph_cache_miss", "fxgraph_cache_bypass"))
