"""Experiment `lipschitz`: the changes that make the network Lipschitz, on and off one by one, and the early spike.

With them, activations of DiT-XL/2 on synthetic latents.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..training.presets import PRESETS
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import bars, look, panels, shared_legend, variants_of
from .latents import GaussianLatents
from .measures import quality
from .results import chosen, last_steps, summary
from .short_run import ShortRun, cell
from .training import Measured, Plan, Trained, cells, with_settings

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
WIDE = ", float32"  # beside bfloat16
OF_LARGE = ("all on", "LayerNorm", "all off")
LARGE = "large network, "  # DiT-XL/2, at full scale
RMS = "activation_rms_blocks."


def plan(setting: Setting) -> list[Cell]:
    """Each change with a usual learning rate and with one that is four times as large; then the large network."""
    return _small_networks(setting) + _large_networks(setting)


def _small_networks(setting: Setting) -> list[Cell]:
    base = bases.images(setting, steps=40)
    if setting.scale == "full":
        base = with_settings(base, {"run.steps": 400, "run.log_every": 1, "run.cuda_graph": False})
    warm_up = setting.pick(quick=1, small=15, full=100)
    variants: dict[str, dict[str, Any]] = {}
    for speed in setting.pick(quick=(1,), small=SPEEDS, full=SPEEDS):
        for name, changes in CHANGES.items():
            rate = base.optim.lr * speed
            own = {"optim.lr": rate, "optim.warmup_steps": warm_up if "warm-up" in name else 0, "run.log_norms": 1}
            variants[f"{name}, lr {rate:g}"] = changes | own
    if base.run.precision != "float32":  # the last two, with the largest learning rate
        for name in ("all on", "all off"):
            variants[f"{name}{WIDE}, lr {rate:g}"] = variants[f"{name}, lr {rate:g}"] | {"run.precision": "float32"}
    samples = setting.pick(quick=32, small=500, full=2500)
    of_samples = quality(setting, (1,), samples)

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


def _large_networks(setting: Setting) -> list[Cell]:
    """Activations of DiT-XL/2, at smaller scales of a network that is as deep as its time allows."""
    sizes = setting.pick(quick=(8, 32, 2, 2, 2), small=(8, 64, 8, 4, 20), full=(32, 1152, 28, 18, 100))
    names = ("model.image_size", "model.width", "model.depth", "model.heads", "run.steps")
    changes = dict(zip(names, sizes, strict=True)) | {
        "run.device": setting.world.device.type, "run.batch": 8, "run.accumulate": 1,
        "run.log_norms": setting.pick(quick=1, small=5, full=5), "run.compile": setting.scale == "full",
        "optim.lr": setting.pick(quick=1e-3, small=1e-3, full=1e-4),
    }  # fmt: skip
    if setting.scale != "full":
        changes["run.precision"] = "float32"
    base = with_settings(PRESETS["imagenet256-w2"](), changes)

    def dataset() -> GaussianLatents:
        return GaussianLatents(base.model.image_size, base.model.num_classes)

    def measure(run: ShortRun) -> Iterator[Measured]:
        for row in run.norms:
            if row.part.startswith("blocks."):
                yield Measured(f"activation_rms_{row.part}", row.activation_rms, step=row.step)

    return [
        cell(
            LARGE + name,
            with_settings(base, CHANGES[name] | {"run.seed": seed}),
            dataset,
            setting.world,
            {"latents": "gaussian"},
            measure,
        )
        for seed in range(setting.pick(quick=1, small=2, full=3))
        for name in OF_LARGE
    ]


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
    and the quality, for each variant; then the large network."""
    large = rows["variant"].str.startswith(LARGE)
    names = [name for name in variants_of(rows) if not name.startswith(LARGE)]
    rates = list(dict.fromkeys(name.rpartition("lr ")[2] for name in names))
    fast = [name for name in names if name.endswith(rates[-1]) and WIDE not in name]
    figure, axes = panels(2, 3, height=2.7)
    kept = rows[rows["variant"].isin(fast)]
    last = max(_block(name) for name in rows.loc[~large, "figure"].unique() if name.startswith(RMS))
    _curves(axes[0], kept, "gradient_norm", "gradient norm")
    _curves(axes[1], kept, f"{RMS}{last}", "RMS of the tokens, last block")
    ends = last_steps(rows[~large])
    bars(axes[2], ends, "largest_gradient_norm", names, len(fast))
    axes[2].set_xlabel("largest gradient norm of the run")
    bars(axes[3], ends, "frechet", names, len(fast))
    axes[3].set_yticklabels([])
    for panel in axes[2:4]:
        panel.tick_params(axis="y", labelsize=6)
    _activations(axes[4:], rows[large])
    shared_legend(figure, axes[0])
    return figure


def _block(figure: str) -> int:
    return int(figure.rpartition(".")[2])


def _activations(axes: Sequence[Axes], rows: pd.DataFrame) -> None:
    """Of the large network: RMS of the tokens after each block at the end, and of the last block over the steps."""
    rows = rows[rows["figure"].str.startswith(RMS)]
    rows = rows.assign(block=rows["figure"].map(_block))
    places = {"block": (axes[0], rows["step"].max(), "step"), "step": (axes[1], rows["block"].max(), "block")}
    for column, (panel, at, other) in places.items():
        for number, name in enumerate(variants_of(rows)):
            means = summary(chosen(rows, variant=name, **{other: at}), column).sort_values(column)
            panel.errorbar(means[column], means["mean"], yerr=means["std"], label=name, **look(number))
        panel.set_yscale("log")
        panel.set_xlabel(column)
        panel.set_ylabel("RMS of the tokens" + (", last block" if column == "step" else f" after {at} steps"))
    axes[0].legend(fontsize=6)


def _curves(axes: Axes, rows: pd.DataFrame, figure: str, label: str) -> None:
    for number, name in enumerate(variants_of(rows)):
        means = summary(chosen(rows, variant=name, figure=figure), "step").sort_values("step")
        axes.plot(means["step"], means["mean"], color=look(number)["color"], label=name.split(", lr")[0])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_title(f"learning rate {variants_of(rows)[0].rpartition('lr ')[2]}", loc="left")


EXPERIMENT = Experiment(
    name="lipschitz",
    question="What do RMS norm, QK norm and modulation norm each do, and what makes the first steps spike?",
    cells=plan,
    draw=draw,
)
