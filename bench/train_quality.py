"""`python -m bench.train_quality`: trains presets as a user would, and records sample quality and training time.

Writes reports/data/<machine>/<preset>.csv; `python -m reports.build` puts the tables into docs/training.md.
It takes as long as the training does.
"""

import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashjvp_commands import arguments as types
from flashjvp_commands import children, ending, outputs
from flashjvp_commands.entry import program
from reports.environment import DATA, ROOT, commit, machine, slug
from reports.training_tables import DIGITS_COLUMNS, TOY_COLUMNS

OURS = outputs.starts_with(b"preset,steps,seed,nfe,samples,")  # whichever figures were measured then
COLUMNS = {"digits": DIGITS_COLUMNS, "toy2d": TOY_COLUMNS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every preset was trained and recorded. A run that fails ends it, and says why."""
    options = types.parser(program("bench.train_quality"), (__doc__ or "").partition(": ")[2])
    options.add_argument(
        "presets", type=types.names_out_of(COLUMNS), nargs="?", default=list(COLUMNS), metavar="NAME,...",
        help=f"presets, out of {', '.join(COLUMNS)} (all)",
    )  # fmt: skip
    options.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH",
        help=f"for the rows: {outputs.HELP % '.csv'}; default reports/data/<machine>/<preset>.csv",
    )  # fmt: skip
    options.add_argument("--set", default="", metavar="OPTIONS", help='training options, such as "--run.steps 10"')
    given = options.parse_args(arguments)
    folder = given.out or DATA / slug(machine(torch.device("cpu")))
    if folder.name.endswith(".csv") and len(given.presets) > 1:
        options.error("--out: expected a folder for several presets, got a file")
    try:
        files = {preset: outputs.prepared(folder, f"{preset}.csv", (".csv",), OURS) for preset in given.presets}
    except outputs.OutputError as error:
        options.error(f"--out: {error}")
    for preset, file in files.items():
        try:
            print(f"wrote {write(file, record(preset, given.set.split()))}")
        except TrainingError as error:
            print(f"{preset}: {error}", file=sys.stderr)
            return error.status
    return 0


class TrainingError(RuntimeError):
    """A training run that did not finish; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the training run ended with exit status {status}")
        self.status = status


def record(preset: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Runs `python -m tvm_ref.train PRESET ...` on the CPU in a temporary folder, and returns a row for each NFE.

    seconds: from the start of Python to its end, including training, sample grids, checkpoints and evaluation;
    processor_seconds: CPU time of all its threads. Raises TrainingError.
    """
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        out = Path(folder) / preset
        command = [sys.executable, "-m", "tvm_ref.train", preset, "--run.out", str(out), "--run.device", "cpu"]
        before, began = os.times(), time.perf_counter()
        with children.child([*command, *settings], cwd=ROOT) as training:
            if status := training.wait():
                raise TrainingError(status)
        seconds, after = time.perf_counter() - began, os.times()
        summary = json.loads((out / "summary.json").read_text())
        steps = (out / "metrics.csv").read_text().splitlines()[-1].split(",")[0]
        run = json.loads(next(out.glob("checkpoints/step-*/config.json")).read_text())["run"]
    processor = sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))
    common = {
        "preset": preset, "steps": steps, "seed": run["seed"], "samples": summary["samples"], **summary["context"],
        "seconds": f"{seconds:.1f}", "processor_seconds": f"{processor:.1f}",
        "machine": machine(torch.device("cpu")), "torch_version": torch.__version__, "commit": commit(),
    }  # fmt: skip
    return [common | {"nfe": nfe} | figures for nfe, figures in summary["nfe"].items()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes the columns of the preset's table. The file appears under its name once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS[rows[0]["preset"]], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: f"{x:.5f}" if isinstance(x, float) else x for n, x in row.items()} for row in rows)
    draft.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(ending.run(main))
