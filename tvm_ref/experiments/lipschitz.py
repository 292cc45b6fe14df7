"""Experiment `lipschitz`: the changes that make the network Lipschitz, on and off one by one, and the early spike."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import bars, look, panels, shared_legend, variants_of
from .measures import quality
from .results import chosen, last_steps, summary
from .training import Measured, Plan, Trained, cells

SPEEDS = (1, 4)  # learning rates, as multiples of that of the base
CHANGES: dict[str, dict[str, Any]] = {
    "all on": {},
    "LayerNorm": {"model.norm": "layer"},
    "no QK norm": {"model.qk_norm": False},
    "no modulation norm": {"model.modulation_norm": False},
    "modulation eps 0.01": {"model.modulation_eps": 1e-2},
    "all off": {"model.norm": "layer", "model.qk_norm": False, "model.modulation_norm": False},
    "all on, warm-up": {},
}


def plan(setting: Setting) -> list[Cell]:
    """Each change with a usual learning rate and with one that is four times as large."""
    base = bases.images(setting, steps=40)
    warm_up = setting.pick(quick=1, small=15, full=500)
    variants = {}
    for speed in setting.pick(quick=(1,), small=SPEEDS, full=SPEEDS):
        for name, changes in CHANGES.items():
            rate = base.optim.lr * speed
            own = {"optim.lr": rate, "optim.warmup_steps": warm_up if "warm-up" in name else 0, "run.log_norms": 1}
            variants[f"{name}, lr {rate:g}"] = changes | own
    samples = setting.pick(quick=32, small=500, full=10_000)
    of_samples = quality((1,), samples)

    def measure(trained: Trained) -> Iterator[Measured]:
        yield from of_samples(trained)
        yield from curves(trained)

    return cells(
        Plan(
            base=base,
            variants=variants,
            seeds=setting.pick(quick=1, small=2, full=3),
            measure=measure,
            measured_with={"samples": samples},
        ),
        setting,
    )


def curves(trained: Trained) -> Iterator[Measured]:
    """Loss and gradient norm of every step, and the root mean square of the tokens after every block.

    Of long runs, the first 200 steps and every 20th.
    """
    metrics = pd.read_csv(trained.folder / "metrics.csv")
    norms = pd.read_csv(trained.folder / "norms.csv")
    for row in metrics.to_dict("records"):
        if int(row["step"]) <= 200 or int(row["step"]) % 20 == 0:
            for name in ("loss", "gradient_norm"):
                yield Measured(name, float(row[name]), step=int(row["step"]))
    yield Measured("largest_gradient_norm", float(metrics["gradient_norm"].max()))
    blocks = norms[norms["part"].str.startswith("blocks.")]
    for row in blocks.to_dict("records"):
        if int(row["step"]) <= 200 or int(row["step"]) % 20 == 0:
            name = f"activation_rms_{row['part']}"
            yield Measured(name, float(row["activation_rms"]), step=int(row["step"]))
    yield Measured("largest_activation_rms", float(blocks["activation_rms"].max()))


def draw(rows: pd.DataFrame) -> Figure:
    """With the larger learning rate: gradient norm and tokens of the last block over the steps; then what is largest,
    and the quality, for each variant."""
    names = variants_of(rows)
    fast = names[len(names) - len(CHANGES) :]
    figure, axes = panels(2, 2, height=2.9)
    kept = rows[rows["variant"].isin(fast)]
    last = max(name for name in rows["figure"].unique() if name.startswith("activation_rms_"))
    _curves(axes[0], kept, "gradient_norm", "gradient norm")
    _curves(axes[1], kept, last, "RMS of the tokens, last block")
    ends = last_steps(rows)
    bars(axes[2], ends, "largest_gradient_norm", names, len(fast))
    axes[2].set_xlabel("largest gradient norm of the run")
    bars(axes[3], ends, "frechet", names, len(fast))
    axes[3].set_yticklabels([])
    for panel in axes[2:]:
        panel.tick_params(axis="y", labelsize=6)
    shared_legend(figure, axes[0])
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, figure: str, label: str) -> None:
    for number, name in enumerate(variants_of(rows)):
        means = summary(chosen(rows, variant=name, figure=figure), "step").sort_values("step")
        axes.plot(means["step"], means["mean"], color=look(number)["color"], label=name.split(", lr")[0])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_title(f"learning rate {variants_of(rows)[0].split('lr ')[1]}", loc="left")


EXPERIMENT = Experiment(
    name="lipschitz",
    question="What do RMS norm, QK norm and modulation norm each do, and what makes the first steps spike?",
    cells=plan,
    draw=draw,
)
