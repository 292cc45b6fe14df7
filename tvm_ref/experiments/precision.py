"""Experiment `precision`: quality after training in float32 and lower precisions, and the error of a JVP by block."""

import copy
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ..data.dataset import open_dataset
from ..model.dit import DiT
from ..model.dual import Dual
from ..objective.loss import Batch
from ..training.batches import Batches
from ..training.step import AUTOCAST
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, look, panels, shared_legend, variants_of
from .measures import quality, real_quality
from .results import summary
from .training import Measured, Plan, Trained, cells

NFES = (1, 4)
PRECISIONS = ("float32", "bfloat16")
OF_A_GPU = ("tf32", "float16", "float8")  # tf32 has no meaning elsewhere, the others no speed
Watched = list[tuple[Tensor, Tensor]]


def plan(setting: Setting) -> list[Cell]:
    """A variant for each precision of matrix products and attention in training."""
    precisions = PRECISIONS + (OF_A_GPU if setting.world.device.type == "cuda" else ())
    base = bases.images(setting, steps=120)
    nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=2500)
    of_samples = quality(setting, nfes, samples)

    def measure(trained: Trained) -> Iterator[Measured]:
        yield from of_samples(trained)
        if trained.config.run.precision == "float32":
            yield from errors_by_block(trained, precisions)

    return cells(
        Plan(
            base=base,
            variants={name: {"run.precision": name} for name in precisions},
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=measure,
            measured_with={"nfes": nfes, "samples": samples},
            floor=lambda seed: real_quality(setting, base.data, samples, seed),
        ),
        setting,
    )


def errors_by_block(trained: Trained, precisions: Sequence[str]) -> Iterator[Measured]:
    """Relative errors |x - x64| / |x64| of the tokens after every block, and of their derivatives by s, of the network
    that float32 trained: computed in each precision, against float64."""
    batch = Batches(trained.config, open_dataset(trained.config.data), trained.world).draw(0)[0]
    batch = Batch(*(field.to(trained.world.device) for field in batch))
    exact = _watched(copy.deepcopy(trained.model).double(), Batch(*map(_double, batch)), None)
    for name in precisions:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        if name == "float8":
            from ..model.float8 import linear_on  # needs an extra

            trained.model.multiply_with(linear_on(trained.world.device))
        seen = _watched(trained.model, batch, AUTOCAST.get(name))
        trained.model.multiply_with(F.linear)
        torch.set_float32_matmul_precision("highest")
        for block, (found, right) in enumerate(zip(seen, exact, strict=True)):
            for kind, one, other in zip(("value", "tangent"), found, right, strict=True):
                error = float((one.double() - other).norm() / other.norm())
                yield Measured(f"{kind} error in {name}, block {block}", error)


def _watched(model: DiT, batch: Batch, dtype: torch.dtype | None) -> Watched:
    """Tokens and tangents after every block, for the times and noise of a training step."""
    seen: Watched = []

    def watch(block: int, tokens: Dual) -> None:
        assert tokens.tangent is not None
        seen.append((tokens.value, tokens.tangent))

    time = batch.t[:, None, None, None]
    x_t = (1 - time) * batch.x0 + time * batch.x1
    model.watch = watch
    with torch.no_grad(), torch.autocast(batch.x0.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        model(x_t, batch.t, batch.s, batch.labels, 1 / batch.w, (None, None, torch.ones_like(batch.s)))
    model.watch = None
    return seen


def _double(field: Tensor) -> Tensor:
    return field.double() if field.is_floating_point() else field


def draw(rows: pd.DataFrame) -> Figure:
    """Quality by evaluations, and the errors by block."""
    figure, axes = panels(2)
    by_nfe(axes[0], rows[~rows["figure"].str.contains("error")], "frechet")
    for number, name in enumerate(variants_of(rows)):
        for kind, line in (("value", "--"), ("tangent", "-")):
            kept = rows[rows["figure"].str.startswith(f"{kind} error in {name}, block")]
            blocks = kept["figure"].str.rsplit(n=1).str[-1].astype(int)
            means = summary(kept.assign(block=blocks), "block").sort_values("block")
            axes[1].errorbar(means["block"], means["mean"], yerr=means["std"], ls=line, **look(number))
    axes[1].set_yscale("log")
    axes[1].set_xlabel("block")
    axes[1].set_ylabel("relative error against float64")
    axes[1].set_xticks(range(len(set(blocks))))
    axes[1].set_title("dashed: tokens, solid: their derivatives by s", loc="left")
    shared_legend(figure, axes[0], columns=5)
    return figure


EXPERIMENT = Experiment(
    name="precision",
    question="Does training in a lower precision cost quality, and where does it lose the derivative?",
    cells=plan,
    draw=draw,
)
