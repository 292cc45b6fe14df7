"""Experiment `memory`: attention with its JVP and gradients of both outputs, dense against flashjvp."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import flashjvp

from .cells import Cell, Experiment, Setting
from .drawing import look, panels, shared_legend
from .results import Row, chosen, summary
from .training import NAN

DENSE, OURS = "dense", "flashjvp"
WARM_UP, ROUNDS = 1, 5
SAVED, PEAK, MS = "MiB kept for backward", "MiB at the peak", "ms, forward and backward"
Pair = tuple[Tensor, Tensor]


def plan(setting: Setting) -> list[Cell]:
    """A cell for each kind, length and seed."""
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
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(dense_attention_jvp(*wide), wide, [x.double() for x in cotangents])
        errors = [(one.double() - other).norm() / other.norm() for one, other in zip(gradients, exact, strict=True)]
        figures["gradient error"] = float(max(errors))
    return [Row(variant, seed, 0, NAN, 0, NAN, name, value) for name, value in figures.items()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(rows: pd.DataFrame) -> Figure:
    """Memory and time against the length."""
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
