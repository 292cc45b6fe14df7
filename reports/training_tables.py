"""Markdown tables of training: the quality of samples of digits and of points in the plane, and what a step takes."""

import re

import pandas as pd

from .tables import markdown

CYCLE = ("cycle_error_t0.25", "cycle_error_t0.5", "cycle_error_t1")  # from the data to t and back, of the network
DIGITS_COLUMNS = (
    "preset", "steps", "seed", "nfe", "samples", "accuracy", "frechet", "judge_accuracy", *CYCLE, "seconds",
    "processor_seconds", "machine", "torch_version", "commit",
)  # fmt: skip
TOY_COLUMNS = (
    "preset", "steps", "seed", "nfe", "samples", "w2", "w2_fresh", *CYCLE, "seconds", "processor_seconds", "machine",
    "torch_version", "commit",
)  # fmt: skip
STEP_COLUMNS = (
    "preset", "compile", "checkpointing", "parallel", "gpus", "batch", "accumulate", "detach", "ms_per_step",
    "ms_fastest", "ms_slowest", "images_per_s", "peak_gib", "reserved_gib", "build_s", "first_step_s", "second_step_s",
    "parameters", "tokens", "loss", "gradient_norm", "torch", "device", "commit",
)  # fmt: skip
EVALUATIONS = "network evaluations"
# Settings of a run whose steps were timed, and their heads; the first ones are always shown.
ALWAYS = {"gpus": "GPUs", "compile": "compile", "checkpointing": "checkpointing"}
VARYING = {"preset": "preset", "parallel": "parallel", "batch": "batch", "accumulate": "accumulate", "detach": "detach"}


def digits_table(data: pd.DataFrame) -> str:
    """Quality of samples by network evaluations: `data` has the columns DIGITS_COLUMNS, all rows of one run."""
    lines = [[str(row.nfe), f"{row.accuracy:.1%}", f"{row.frechet:.3f}"] for row in data.itertuples()]
    judge = f"the classifier knows {data['judge_accuracy'].iloc[0]:.1%} of the real digits that it has not seen."
    heads = [EVALUATIONS, "classified as their label", "Frechet distance of pixels"]
    return f"{markdown(heads, lines, left=1)}\n\n{_source(data)}; {judge}"


def toy_table(data: pd.DataFrame) -> str:
    """Quality of points by network evaluations: `data` has the columns TOY_COLUMNS, all rows of one run."""
    lines = [[str(row.nfe), f"{row.w2:.3f}"] for row in data.itertuples()]
    fresh = f"between two sets of as many fresh points the distance is {data['w2_fresh'].iloc[0]:.3f}."
    heads = [EVALUATIONS, "2-Wasserstein distance to fresh points"]
    return f"{markdown(heads, lines, left=1)}\n\n{_source(data)}; {fresh}"


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
    """Time and memory of a training step by settings: `data` has the columns STEP_COLUMNS."""
    settings = ALWAYS | {name: head for name, head in VARYING.items() if data[name].nunique() > 1}
    lines = [
        [str(row[name]) for name in settings]
        + [f"{row['ms_per_step']:.0f}", f"{row['images_per_s']:.0f}", f"{row['peak_gib']:.1f}"]
        for _, row in data.iterrows()
    ]
    first = data.iloc[0]
    same = ", ".join(f"{head} {first[name]}" for name, head in VARYING.items() if name not in settings)
    commits = " and ".join(map(_short, data["commit"].unique()))
    source = f"{first['device']}; torch {first['torch']}; code: {commits}. In every row: {same}."
    heads = [*settings.values(), "ms a step", "images/s", "peak GiB"]
    return f"{markdown(heads, lines, left=len(settings))}\n\n{source}"
