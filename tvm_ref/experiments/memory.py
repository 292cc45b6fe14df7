"""Experiment `memory`: attention with its JVP and gradients of both outputs, dense against flashjvp.

Also a whole training step of DiT-XL/2 with 16384 tokens.
"""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import flashjvp

from ..objective.loss import Batch
from ..training.batches import Batches
from ..training.config import TrainConfig
from ..training.parallel import World
from ..training.presets import PRESETS
from ..training.state import State
from ..training.step import gradient
from .cells import Cell, Experiment, Setting
from .drawing import look, panels, shared_legend
from .latents import GaussianLatents
from .results import Row, chosen, summary
from .training import NAN, settings_of, with_settings

DENSE, OURS = "dense", "flashjvp"
STEP = ", training step"
WARM_UP, ROUNDS, STEPS = 1, 5, 2
SAVED, PEAK, MS = "MiB kept for backward", "MiB at the peak", "ms, forward and backward"
Pair = tuple[Tensor, Tensor]


def plan(setting: Setting) -> list[Cell]:
    """A cell for each kind, length and seed, and for each kind a training step."""
    return _attention(setting) + _steps(setting)


def _attention(setting: Setting) -> list[Cell]:
    lengths = setting.pick(quick=(32, 64), small=(128, 256, 512, 1024), full=(1024, 2048, 4096, 8192))
    heads, width = setting.pick(quick=(1, 16), small=(2, 32), full=(24, 64))
    dtype = torch.bfloat16 if setting.world.device.type == "cuda" else torch.float32
    found = []
    for seed in range(setting.pick(quick=1, small=3, full=3)):
        for kind in (DENSE, OURS):
            for length in lengths:
                shape = (1, heads, length, width)
                settings = {"kind": kind, "shape": list(shape), "dtype": str(dtype)}

                def work(_: Path, kind: str = kind, shape: Any = shape, seed: int = seed) -> list[Row]:
                    return _measured(kind, shape, seed, dtype, setting.world.device)

                found.append(Cell(variant=f"{kind}, {length} tokens", seed=seed, settings=settings, work=work))
    return found


def _steps(setting: Setting) -> list[Cell]:
    """Steps of one image with activation checkpoints, at smaller scales of a small network. Dense attention is that of
    the backend `reference`."""
    sizes = setting.pick(quick=(8, 32, 2, 2), small=(16, 32, 2, 2), full=(256, 1152, 28, 18))
    names = ("model.image_size", "model.width", "model.depth", "model.heads")
    changes = dict(zip(names, sizes, strict=True)) | {
        "run.device": setting.world.device.type, "run.batch": 1, "run.accumulate": 1, "run.checkpointing": "full",
        "run.compile": False,
    }  # fmt: skip
    if setting.scale != "full":
        changes["run.precision"] = "float32"
    found = []
    for kind, backend in ((DENSE, "reference"), (OURS, None)):
        config = with_settings(PRESETS["imagenet256-w2"](), changes | {"model.attention_backend": backend})

        def work(_: Path, kind: str = kind, config: TrainConfig = config) -> list[Row]:
            figures = _of_step(config, setting.world)
            return [Row(f"{kind}{STEP}", 0, 0, NAN, 0, NAN, name, value) for name, value in figures.items()]

        found.append(Cell(variant=f"{kind}{STEP}", seed=0, settings=settings_of(config), work=work))
    return found


def _of_step(config: TrainConfig, world: World) -> dict[str, float]:
    """Peak of memory and least time of a step's gradient; or that it does not fit into the GPU."""
    dataset = GaussianLatents(config.model.image_size, config.model.num_classes)
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    times = []
    try:
        state = State(config, world)
        batches = [Batch(*(x.to(world.device) for x in batch)) for batch in Batches(config, dataset, world).draw(0)]
        for _ in range(WARM_UP + STEPS):
            began = time.perf_counter()
            gradient(state.objective, state.target, batches, world)  # waits for the device
            times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return {"out of memory": 1.0, "GiB of the GPU": torch.cuda.mem_get_info(world.device)[1] / 2**30}
    figures = {"ms, a step": min(times[WARM_UP:]) * 1e3}
    if on_gpu:
        figures["GiB at the peak, a step"] = torch.cuda.max_memory_allocated(world.device) / 2**30
    return figures


def dense_attention_jvp(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor) -> Pair:
    """(o, o_t) by the matrix of all pairs, P = softmax(q k^T / sqrt(D)), as PyTorch's own operators compute it:

    o = P v,   o_t = (P (S_t - rowsum(P S_t))) v + P v_t,   S_t = (q_t k^T + q k_t^T) / sqrt(D)
    """
    scale = q.shape[-1] ** -0.5
    P = torch.softmax(scale * q @ k.mT, dim=-1)
    S_t = scale * (q_t @ k.mT + q @ k_t.mT)
    P_t = P * (S_t - (P * S_t).sum(-1, keepdim=True))
    return P @ v, P_t @ v + P @ v_t


def _measured(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Bytes that autograd keeps, the peak on a GPU, the least time of some rounds, and the error of the gradients of
    flashjvp against dense attention in float64."""
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for _ in range(6)]
    cotangents = [torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2)]
    function = dense_attention_jvp if kind == DENSE else flashjvp.attention_jvp
    variant = f"{kind}, {shape[2]} tokens"
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, cotangents)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function(*inputs)
    del outputs
    figures = {SAVED: sum(kept.values()) / 2**20}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once()
        figures[PEAK] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    times = []
    for _ in range(WARM_UP + ROUNDS):
        _wait(device)
        began = time.perf_counter()
        gradients = once()
        _wait(device)
        times.append(time.perf_counter() - began)
    figures[MS] = min(times[WARM_UP:]) * 1e3
    if kind == OURS:
        figures["gradient error"] = _error(inputs, cotangents, gradients)
    return [Row(variant, seed, 0, NAN, 0, NAN, name, value) for name, value in figures.items()]


def _error(inputs: list[Tensor], cotangents: list[Tensor], gradients: tuple[Tensor, ...]) -> float:
    """The largest relative error of a gradient against dense attention in float64, which has room for one head."""
    squares = torch.zeros(2, len(inputs), dtype=torch.float64)
    for head in range(inputs[0].shape[1]):
        wide = [x.detach()[:, head].double().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(dense_attention_jvp(*wide), wide, [x[:, head].double() for x in cotangents])
        for place, (one, other) in enumerate(zip(gradients, exact, strict=True)):
            squares[0, place] += (one[:, head].double() - other).square().sum().cpu()
            squares[1, place] += other.square().sum().cpu()
    return float((squares[0] / squares[1]).sqrt().max())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(rows: pd.DataFrame) -> Figure:
    """Memory and time of attention against the length."""
    rows = rows[~rows["variant"].str.endswith(STEP)]
    lengths = rows["variant"].str.extract(r", (\d+) tokens")[0].astype(int)
    rows = rows.assign(length=lengths, variant=rows["variant"].str.split(",").str[0])
    memory = PEAK if (rows["figure"] == PEAK).any() else SAVED
    figure, axes = panels(2)
    for panel, name in zip(axes, (memory, MS), strict=True):
        for number, kind in enumerate((DENSE, OURS)):
            means = summary(chosen(rows, variant=kind, figure=name), "length").sort_values("length")
            panel.errorbar(means["length"], means["mean"], yerr=means["std"], label=kind, **look(number))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens")
        panel.set_ylabel(name)
    shared_legend(figure, axes[0])
    return figure


EXPERIMENT = Experiment(
    name="memory",
    question="What does attention with its JVP take, dense and by flashjvp, with the gradients of both outputs?",
    cells=plan,
    draw=draw,
)
