"""Experiment `fast_step`: the loss of an eager step in float32 and of faster ones, over the same batches."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import GREY, look, panels, plain_numbers, shared_legend, variants_of
from .results import chosen, summary
from .training import Measured, Plan, Trained, cells, with_settings

EAGER: dict[str, Any] = {"run.compile": False, "run.cuda_graph": False}
FAST: dict[str, Any] = {"run.compile": True, "run.cuda_graph": True}
REFERENCE = "eager float32"
WINDOWS = 40  # in which a run's losses are averaged


def plan(setting: Setting) -> list[Cell]:
    """Eager steps in float32 and bfloat16; on a GPU the fast step in bfloat16 and float8, elsewhere float8 eagerly."""
    base = bases.images(setting, steps=1000)
    if setting.scale == "full":
        base = with_settings(base, {"run.steps": 2000})
    kind, fast = ("fast", FAST) if setting.world.device.type == "cuda" else ("eager", EAGER)
    variants: dict[str, dict[str, Any]] = {
        REFERENCE: EAGER | {"run.precision": "float32"},
        "eager bfloat16": EAGER | {"run.precision": "bfloat16"},
        f"{kind} float8": fast | {"run.precision": "float8"},
    }
    if fast is FAST:
        variants["fast bfloat16"] = FAST | {"run.precision": "bfloat16"}
    return cells(
        Plan(
            base=with_settings(base, {"run.log_every": 1}),
            variants=variants,
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=losses,
            measured_with={"windows": WINDOWS},
        ),
        setting,
    )


def losses(trained: Trained) -> Iterator[Measured]:
    """Means of the loss over equal windows of steps, each at its last step."""
    metrics = pd.read_csv(trained.folder / "metrics.csv")
    window = max(1, trained.step // WINDOWS)
    for last, rows in metrics.groupby((metrics["step"] - 1) // window):
        yield Measured("loss", float(rows["loss"].mean()), step=(int(str(last)) + 1) * window)


def differences(rows: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Of each variant and window, how much larger its mean over seeds is than the reference's (`apart`), relative; and
    the relative standard deviation over seeds of the reference, the root mean square over windows."""
    means = summary(chosen(rows, figure="loss"), ["variant", "step"])
    reference = chosen(means, variant=REFERENCE).set_index("step")
    noise = float((reference["std"] / reference["mean"]).pow(2).mean() ** 0.5)
    return means.assign(apart=means["mean"] / means["step"].map(reference["mean"]) - 1), noise


def draw(rows: pd.DataFrame) -> Figure:
    """The losses; how far they are apart, beside the spread of seeds."""
    figure, axes = panels(2)
    apart, noise = differences(rows)
    for number, name in enumerate(variants_of(rows)):
        means = summary(chosen(rows, variant=name, figure="loss"), "step")
        axes[0].errorbar(means["step"], means["mean"], yerr=means["std"], label=name, **look(number))
        own = chosen(apart, variant=name)
        axes[1].plot(own["step"], 100 * own["apart"], **look(number))
    axes[0].set_ylabel("loss, mean of a window")
    axes[0].set_yscale("log")
    plain_numbers(axes[0].yaxis, *axes[0].get_ylim())
    axes[1].set_ylabel("larger than the reference, %")
    axes[1].set_title(f"dotted: standard deviation of {REFERENCE}", loc="left")
    for level in (-noise, noise):
        axes[1].axhline(100 * level, color=GREY, linestyle=":", linewidth=1)
    for panel in axes:
        panel.set_xlabel("step")
    shared_legend(figure, axes[0])
    return figure


EXPERIMENT = Experiment(
    name="fast_step",
    question="Does a faster step learn what an eager one in float32 learns?",
    cells=plan,
    draw=draw,
)
