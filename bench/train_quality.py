"""`python -m bench.train_quality`: trains presets as a user would, and records sample quality and training time.

Writes reports/data/<machine>/<preset>.csv; `python -m reports.build` puts the tables into docs/training.md.
It takes as long as the training does.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reports.environment import DATA, ROOT, commit, machine, slug
from reports.training_tables import DIGITS_COLUMNS, TOY_COLUMNS
from verify.arguments import names_out_of

COLUMNS = {"digits": DIGITS_COLUMNS, "toy2d": TOY_COLUMNS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every preset was trained and recorded. A run that fails ends it, and says why."""
    options = argparse.ArgumentParser(prog="python -m bench.train_quality", description=(__doc__ or ""))
    options.add_argument(
        "presets", type=names_out_of(COLUMNS), nargs="?", default=list(COLUMNS), metavar="LIST",
        help=f"presets, out of {', '.join(COLUMNS)} (all)",
    )  # fmt: skip
    options.add_argument("--out", type=Path, metavar="DIR", help="folder of the CSVs; default reports/data/<machine>")
    options.add_argument("--set", default="", metavar="OPTIONS", help='training options, such as "--run.steps 10"')
    given = options.parse_args(arguments)
    folder = given.out or DATA / slug(machine(torch.device("cpu")))
    for preset in given.presets:
        print(f"wrote {write(folder / f'{preset}.csv', record(preset, given.set.split()))}")
    return 0


def record(preset: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Runs `python -m tvm_ref.train PRESET ...` on the CPU in a temporary folder, and returns a row for each NFE.

    seconds: from the start of Python to its end, including training, sample grids, checkpoints and evaluation;
    processor_seconds: CPU time of all its threads. Raises CalledProcessError.
    """
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        out = Path(folder) / preset
        command = [sys.executable, "-m", "tvm_ref.train", preset, "--run.out", str(out), "--run.device", "cpu"]
        before, began = os.times(), time.perf_counter()
        subprocess.run([*command, *settings], cwd=ROOT, check=True)
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
    sys.exit(main())
