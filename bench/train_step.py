"""`python -m bench.train_step`: time and memory of a training step of a preset, on synthetic data, as rows of a CSV.

Rows are measured one after the other, in one process, or with torchrun in one process per GPU:

    python -m bench.train_step --checkpointing none,selective --out steps.csv
    python -m bench.train_step --peer official=../tvm --out steps.csv
    torchrun --nproc-per-node 2 -m bench.train_step --profile profile.csv

The global batch of a step depends only on the step number. So rows of equal preset, objective and batch size must agree
in `loss` and `gradient_norm` (both of the third step), whatever their other settings. `first_step_s` is from a cold
cache where TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name empty folders; `graphs_compiled` is 0 from a warm one.
"""

import argparse
import copy
import dataclasses
import gc
import itertools
import statistics
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Generator, Tensor

from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs, terminal
from flashjvp_commands.entry import program
from reports.environment import commit, machine
from reports.schema import write_rows
from reports.step_profile import PROFILE_COLUMNS
from reports.training_tables import STEP_COLUMNS
from tvm_ref.data.noise import indexed_normals
from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.objective.loss import OBJECTIVES, Batch
from tvm_ref.training.batches import Batches
from tvm_ref.training.config import ConfigError, RunConfig, TrainConfig
from tvm_ref.training.logger import peak_memory_gib
from tvm_ref.training.parallel import World, leave, world
from tvm_ref.training.presets import PRESETS
from tvm_ref.training.state import initialised

from .step_profile import Profiler, write_profile
from .step_row import StepRow, graphs_compiled
from .trainers import (
    OFFICIAL,
    OURS,
    OfficialStep,
    Step,
    TvmRefStep,
    official_module,
    official_path,
    official_settings,
)

WARM_STEPS = 2  # warm-up: the first step compiles, the second may
COMPARED = 3  # the step whose loss and gradient norm a row holds


class Synthetic:
    """A data set of the items of one step: N(0, 1) noise of the network's input shape, with labels in turn."""

    def __init__(self, model: DiTConfig, count: int) -> None:
        self.shape = (model.channels, model.image_size, model.image_size)
        self.num_classes = model.num_classes
        self._count = count

    def __len__(self) -> int:
        return self._count

    def get(self, indices: np.ndarray, draw: Generator) -> tuple[Tensor, Tensor]:
        """Returns items float32 [n, C, H, W] and labels int64 [n]."""
        labels = torch.from_numpy(indices) % max(self.num_classes, 1)
        return indexed_normals(0, indices.tolist(), self.shape), labels


def parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    options = types.parser(program("bench.train_step"), description, epilog)
    kinds = {"checkpointing": ("none", "full", "selective"), "parallel": ("ddp", "fsdp"), "compile": ("on", "off")}
    kinds |= {"cuda-graph": ("off", "on"), "detach": ("off", "on"), "residual": ("float32", "bfloat16")}
    options.add_argument(
        "--preset", choices=PRESETS, default="imagenet256-w2", metavar="NAME",
        help=f"out of {', '.join(PRESETS)} (imagenet256-w2)",
    )  # fmt: skip
    names = typing.get_args(typing.get_type_hints(RunConfig)["precision"])
    expected = f"out of {', '.join(names)} (the preset's)"
    options.add_argument("--precision", type=types.names_out_of(names), metavar="LIST", help=expected)
    expected = f"out of {', '.join(OBJECTIVES)} (the preset's)"
    options.add_argument("--objective", type=types.names_out_of(OBJECTIVES), metavar="LIST", help=expected)
    options.add_argument(
        "--image-size", type=types.whole(1), metavar="N",
        help="side of an image or its latent in place of the preset's: of imagenet, 128 gives 4096 tokens, 256 16384",
    )  # fmt: skip
    for name, allowed in kinds.items():
        options.add_argument(
            f"--{name}", type=types.names_out_of(allowed), default=[allowed[0]], metavar="LIST",
            help=f"out of {', '.join(allowed)}; a row for each combination ({allowed[0]})",
        )  # fmt: skip
    options.add_argument(
        "--batch", type=types.whole(1), default=64, metavar="N", help="global batch size, in images (64)"
    )
    options.add_argument(
        "--accumulate", type=types.whole(1), default=1, metavar="N", help="micro-batches of a process (1)"
    )
    options.add_argument(
        "--steps", type=types.whole(1), default=10, metavar="N", help="timed steps, after two of warm-up (10)"
    )
    options.add_argument(
        "--profile", type=outputs.path_with(".csv"), metavar="PATH",
        help="traces two more steps of each row of tvm_ref, prints where their time goes, and writes it here, with a "
        f"figure beside it: {outputs.HELP % '.csv'}",
    )  # fmt: skip
    options.add_argument(
        "--peer", type=official_path, metavar=f"{OFFICIAL}=PATH",
        help="also measures the published trainer, eager, in a checkout of lumalabs/tvm (with einops and jaxtyping)",
    )  # fmt: skip
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    options.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH",
        help=f"for the rows, written as they come: {outputs.HELP % '.csv'}; without it they are only printed",
    )  # fmt: skip
    return options


def settings(options: argparse.Namespace) -> Iterator[TrainConfig]:
    """Yields the configuration of each row. Raises ValueError for an invalid one."""
    preset = PRESETS[options.preset]()
    model = dataclasses.replace(preset.model, image_size=options.image_size or preset.model.image_size)
    for objective, detach, precision, residual, compiled, checkpointing, graph, parallel in itertools.product(
        options.objective or [preset.loss.objective], options.detach, options.precision or [preset.run.precision],
        options.residual, options.compile, options.checkpointing, options.cuda_graph, options.parallel,
    ):  # fmt: skip
        run: dict[str, Any] = {"batch": options.batch, "accumulate": options.accumulate, "device": options.device}
        run |= {"compile": compiled == "on", "checkpointing": checkpointing, "parallel": parallel}
        run |= {"cuda_graph": graph == "on", "precision": precision, "residual": residual}
        yield dataclasses.replace(
            preset,
            model=model,
            loss=dataclasses.replace(preset.loss, objective=objective, detach=detach == "on"),
            run=RunConfig(**(vars(preset.run) | run)),
        )


def measure(
    trainer: str, preset: str, config: TrainConfig, make: Callable[[], Step], build_s: float, steps: int, this: World,
    profiler: Profiler | None = None,
) -> StepRow:  # fmt: skip
    """Measures the row of a configuration with the step that `make` builds. Every process calls it.

    build_s: seconds that it took to build what `make` copies. profiler: traces steps after those that are timed.
    """
    before = _memory(this)
    batches = Batches(config, Synthetic(config.model, config.run.batch), this)
    draws = [batches.draw(step) for step in range(WARM_STEPS + steps)]
    began = time.perf_counter()
    step = make()
    _wait(this)
    build_s += time.perf_counter() - began
    seconds, found, compiled_before = [], [], graphs_compiled()

    def make_step(draw: list[Batch]) -> None:
        found.append(step([Batch(*(x.to(this.device, non_blocking=True) for x in batch)) for batch in draw]))

    for i, draw in enumerate(draws):
        if i == WARM_STEPS:
            compiled = graphs_compiled() - compiled_before
        began = time.perf_counter()
        make_step(draw)
        _wait(this)
        seconds.append(time.perf_counter() - began)
    timed, run = seconds[WARM_STEPS:], config.run
    peak, reserved = (max(values) for values in zip(*this.gather(_peaks(this)), strict=True))
    median = statistics.median(timed)
    row = StepRow(
        trainer=trainer, preset=preset, precision=run.precision, residual=run.residual,
        compile="on" if run.compile else "off", checkpointing=run.checkpointing,
        cuda_graph="on" if run.cuda_graph else "off", parallel=run.parallel, gpus=this.size, batch=run.batch,
        accumulate=run.accumulate, objective=config.loss.objective, detach=config.loss.detach,
        ms_per_step=1e3 * median, ms_fastest=1e3 * min(timed), ms_slowest=1e3 * max(timed),
        images_per_s=run.batch / median, peak_gib=peak - before, reserved_gib=reserved,
        build_s=build_s, first_step_s=seconds[0], second_step_s=seconds[1], graphs_compiled=compiled,
        parameters=step.parameters, tokens=config.model.grid**2, **found[COMPARED - 1]._asdict(),
        torch=torch.__version__, device=machine(this.device), commit=commit(),
    )  # fmt: skip
    if profiler is not None:
        profiler.trace(row, lambda: make_step(draws[-1]))
    return row


def _wait(this: World) -> None:
    if this.device.type == "cuda":
        torch.cuda.synchronize()


def _memory(this: World) -> float:
    """Frees all unused memory, resets the peak counters, and returns the GiB still in use."""
    torch._dynamo.reset()  # otherwise what one row compiled counts against the limit of the next
    gc.collect()
    if this.device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def _peaks(this: World) -> tuple[float, float]:
    """Peak GiB of tensors, and of memory that the allocator reserved."""
    if this.device.type != "cuda":
        return peak_memory_gib(), peak_memory_gib()
    return peak_memory_gib(), torch.cuda.max_memory_reserved() / 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every row was measured, 1 if one ran out of memory, 2 for invalid settings."""
    options = parser().parse_args(arguments)
    console = terminal.console()
    rows: list[StepRow] = []
    failed = False
    try:
        configs = list(settings(options))
        recognise = outputs.has_columns(STEP_COLUMNS)
        with outputs.option("--out"):
            out = options.out and outputs.prepared(options.out, "train-step.csv", (".csv",), recognise)
        recognise = outputs.has_columns(PROFILE_COLUMNS)
        with outputs.option("--profile"):
            profile = options.profile and outputs.prepared(options.profile, "step-profile.csv", (".csv",), recognise)
        with world(options.device) as this, official_module(options.peer) as wrapper:
            theirs = [(OFFICIAL, config) for config in official_settings(configs, this)] if wrapper else []
            kinds: dict[str, Callable[..., Step]] = {OURS: _ours, OFFICIAL: partial(OfficialStep, wrapper)}
            profiler = Profiler(this) if profile else None
            began = time.perf_counter()
            start = initialised(configs[0], this).cpu()  # once: the spectral norms of large weights take seconds
            build_s = time.perf_counter() - began
            for trainer, config in [*((OURS, config) for config in configs), *theirs]:
                make = partial(kinds[trainer], config, start, this)
                traced = profiler if trainer == OURS else None
                try:
                    rows.append(measure(trainer, options.preset, config, make, build_s, options.steps, this, traced))
                except torch.OutOfMemoryError as error:
                    if this.size > 1:  # the other processes wait for this one
                        raise
                    console.print(f"{trainer}, {_name(config, options.preset)}: {error}", style="red", markup=False)
                    failed = True
                    continue
                if this.first:
                    _show(console, rows[-1])
                    if out:  # write after every row, so that an interrupted run keeps what it has
                        write_rows(out, rows, STEP_COLUMNS)
                    if profiler and traced:
                        console.print(profiler.table(), markup=False, highlight=False, soft_wrap=True)
                        write_profile(profile, profiler.rows)
    except KeyboardInterrupt as stop:
        if options.out and rows:
            console.print(f"stopped: {len(rows)} rows are in {out}", highlight=False, soft_wrap=True)
        return ending.stopped_status(stop)
    except (ConfigError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 1 if failed else 0


def _ours(config: TrainConfig, start: DiT, this: World) -> Step:
    return TvmRefStep(config, copy.deepcopy(start), this)


def _name(config: TrainConfig, preset: str) -> str:
    run = config.run
    how = f"compile {'on' if run.compile else 'off'} checkpointing {run.checkpointing} {run.parallel}"
    return f"{preset} {config.loss.objective} {how} batch {run.batch} / {run.accumulate}"


def _show(console: Console, row: StepRow) -> None:
    console.print(
        f"{row.trainer}, {row.preset} {row.objective}{', detached' * row.detach}, {row.tokens} tokens, "
        f"compile {row.compile} checkpointing {row.checkpointing} {row.parallel} gpus {row.gpus} "
        f"batch {row.batch} / {row.accumulate}: "
        f"{row.ms_per_step:.1f} ms ({row.ms_fastest:.1f} to {row.ms_slowest:.1f}), {row.images_per_s:.1f} images/s, "
        f"{row.peak_gib:.2f} GiB, first step {row.first_step_s:.1f} s ({row.graphs_compiled} graphs compiled), "
        f"step {COMPARED}: loss {row.loss:.6g}, gradient {row.gradient_norm:.6g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    leave(ending.run(main))
