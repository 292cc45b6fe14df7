"""Markdown tables of training: the quality of samples of digits and of points in the plane, and what a step takes."""

import re

import pandas as pd

from .tables import markdown

CYCLE = ("cycle_error_t0.25", "cycle_error_t0.5", "cycle_error_t1")  # from the data to t and back, of the network
DIVERSITY = ("precision", "recall", "variance")
DIGITS_COLUMNS = (
    "preset", "steps", "seed", "nfe", "samples", "accuracy", "frechet", *DIVERSITY, "judge_accuracy",
    "frechet_bootstrap", *(f"{name}_bootstrap" for name in DIVERSITY), *CYCLE, "seconds", "processor_seconds",
    "machine", "torch_version", "commit",
)  # fmt: skip
TOY_COLUMNS = (
    "preset", "steps", "seed", "nfe", "samples", "w2", *DIVERSITY, "w2_fresh",
    *(f"{name}_fresh" for name in DIVERSITY), *CYCLE, "seconds", "processor_seconds", "machine", "torch_version",
    "commit",
)  # fmt: skip
# Figures of samples: how they are headed and written.
FIGURES = {
    "accuracy": ("classified as their label", "{:.1%}"), "frechet": ("Frechet distance of pixels", "{:.3f}"),
    "w2": ("2-Wasserstein distance to fresh points", "{:.3f}"), "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"), "variance": ("variance within classes", "{:.2f}"),
}  # fmt: skip
STEP_COLUMNS = (
    "trainer", "preset", "precision", "residual", "compile", "checkpointing", "cuda_graph", "parallel", "gpus", "batch",
    "accumulate", "objective", "detach", "ms_per_step", "ms_fastest", "ms_slowest", "images_per_s", "peak_gib",
    "reserved_gib", "build_s", "first_step_s", "second_step_s", "graphs_compiled", "parameters", "tokens", "loss",
    "gradient_norm", "torch", "device", "commit",
)  # fmt: skip
# Columns of files from before types of the residual stream, another trainer, and objectives were measured.
STEP_COLUMNS_3 = tuple(name for name in STEP_COLUMNS if name != "residual")
STEP_COLUMNS_2 = STEP_COLUMNS_3[1:]
OLD_STEP_COLUMNS = tuple(name for name in STEP_COLUMNS_2 if name not in ("objective", "graphs_compiled"))
# Columns of files from before diversity and the figures of real digits were measured.
OLD_DIGITS_COLUMNS = tuple(
    name for name in DIGITS_COLUMNS if name not in DIVERSITY and not name.endswith("_bootstrap")
)  # fmt: skip
OLD_TOY_COLUMNS = tuple(name for name in TOY_COLUMNS if name.removesuffix("_fresh") not in DIVERSITY)
EVALUATIONS = "network evaluations"
PEER = "official"  # the published trainer
# Settings of a run whose steps were timed, and their heads; the first ones are always shown.
ALWAYS = {"gpus": "GPUs", "compile": "compile", "checkpointing": "checkpointing"}
VARYING = {
    "trainer": "trainer", "preset": "preset", "precision": "precision", "residual": "residual stream",
    "cuda_graph": "CUDA graph", "parallel": "parallel", "batch": "batch", "accumulate": "accumulate",
    "objective": "objective", "detach": "detach",
}  # fmt: skip


def digits_table(data: pd.DataFrame) -> str:
    """Quality of samples by network evaluations: `data` has DIGITS_COLUMNS or the old ones, all rows of one run."""
    judge = f"the classifier knows {data['judge_accuracy'].iloc[0]:.1%} of the real digits that it has not seen."
    return f"{_figures(data, 'bootstrap', 'real digits, drawn with replacement')}\n\n{_source(data)}; {judge}"


def toy_table(data: pd.DataFrame) -> str:
    """Quality of points by network evaluations: `data` has TOY_COLUMNS or the old ones, all rows of one run."""
    return f"{_figures(data, 'fresh', 'other fresh points')}\n\n{_source(data)}."


def _figures(data: pd.DataFrame, floor: str, of: str) -> str:
    """A line for each number of evaluations, and one of the figures that real data reach."""
    shown = [name for name in FIGURES if name in data]
    lines = [[str(row["nfe"]), *(FIGURES[name][1].format(row[name]) for name in shown)] for _, row in data.iterrows()]
    first = data.iloc[0]
    real = [f"{name}_{floor}" for name in shown]
    if any(name in data for name in real):
        cells = [FIGURES[name][1].format(first[at]) if at in data else "" for name, at in zip(shown, real, strict=True)]
        lines.append([of, *cells])
    return markdown([EVALUATIONS, *(FIGURES[name][0] for name in shown)], lines, left=1)


def _source(data: pd.DataFrame) -> str:
    """Where the samples of one run were measured, and of which run they are."""
    first = data.iloc[0]
    cycle = ", ".join(f"{first[name]:.3f} from t = {name.removeprefix('cycle_error_t')}" for name in CYCLE)
    code = f"{first['machine']}; torch {first['torch_version']}, commit {_short(first['commit'])}"
    command = f"`python -m tvm_ref.train {first['preset']} --run.seed {first['seed']}`"
    seconds = f"{first['seconds']:.0f} s ({first['processor_seconds']:.0f} s of processor time)"
    return (
        f"{code}. By {command}: {first['steps']} steps, then {first['samples']} samples, in {seconds}. "
        f"Cycle error: {cycle}"
    )


def _short(commit: str) -> str:
    """Seven digits of a commit's forty."""
    return commit[:7] if re.fullmatch("[0-9a-f]{40}", commit) else commit


def step_table(data: pd.DataFrame) -> str:
    """Time and memory of a training step by settings: `data` has the columns STEP_COLUMNS or the old ones.

    Where another trainer was measured, too, the last column says how many times as fast each row is as its row.
    """
    could_vary = {name: head for name, head in VARYING.items() if name in data}
    may_vary = could_vary | {"tokens": "tokens"}
    settings = ALWAYS | {name: head for name, head in may_vary.items() if data[name].nunique() > 1}
    lines = [
        [str(row[name]) for name in settings]
        + [f"{row['ms_per_step']:.0f}", f"{row['images_per_s']:.3g}", f"{row['peak_gib']:.1f}", *_first_step(row)]
        for _, row in data.iterrows()
    ]
    peers = _peers(data)
    if peers:
        lines = [[*line, peers[i]] for i, line in enumerate(lines)]
    first = data.iloc[0]
    same = ", ".join(f"{head} {first[name]}" for name, head in could_vary.items() if name not in settings)
    commits = " and ".join(map(_short, data["commit"].unique()))
    source = f"{first['device']}; torch {first['torch']}; code: {commits}. In every row: {same}."
    heads = [*settings.values(), "ms a step", "images/s", "peak GiB"]
    heads += ["first step, s"] if "graphs_compiled" in data else []
    heads += [f"against {PEER}"] if peers else []
    return f"{markdown(heads, lines, left=len(settings))}\n\n{source}"


def _peers(data: pd.DataFrame) -> list[str]:
    """How many times as fast as the peer's step of the same batch each row is, if the peer is there."""
    if "trainer" not in data or not (data["trainer"] == PEER).any():
        return []
    alike = ["preset", "batch", "tokens", "detach"]
    theirs = data[data["trainer"] == PEER].set_index(alike)["images_per_s"]
    keys = data[alike].itertuples(index=False, name=None)
    speeds = zip(keys, data["images_per_s"], strict=True)
    return [f"{speed / theirs[key]:.2f}" if key in theirs.index else "" for key, speed in speeds]


def _first_step(row: pd.Series) -> list[str]:
    """Seconds of the first step, and whether it compiled graphs or found them in inductor's cache, if that is known."""
    if "graphs_compiled" not in row:
        return []
    cache = "" if row["compile"] == "off" else " (cold)" if row["graphs_compiled"] else " (warm)"
    return [f"{row['first_step_s']:.1f}{cache}"]
