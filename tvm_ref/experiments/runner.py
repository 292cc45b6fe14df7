"""Runs the cells of an experiment, one after the other, and keeps each that is finished."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from ..data.untrusted import read_settings
from ..training.files import write_atomically
from .cells import Cell, Experiment, Setting
from .drawing import STYLE, save
from .results import Row, table, write_rows

FINISHED = "finished.json"  # in the folder of a cell


class ExperimentError(ValueError):
    """A folder holds cells that were run with other settings, or that are no cells."""


def run(experiment: Experiment, setting: Setting, say: Callable[[str], None]) -> Path:
    """Runs what is missing of an experiment, and writes NAME.csv and NAME.png; returns the path of the CSV.

    The CSV grows with every cell. Raises ExperimentError where the folder has cells of other settings, and whatever a
    cell raises; Stopped where a signal came.
    """
    cells = experiment.cells(setting)
    path = setting.folder / f"{experiment.name}.csv"
    rows: list[Row] = []
    kept = [_kept(_folder(setting, experiment, cell), cell) for cell in cells]
    say(f"{experiment.name}: {experiment.question}\nRows go to {path}")
    for number, (cell, found) in enumerate(zip(cells, kept, strict=True), 1):
        folder = _folder(setting, experiment, cell)
        if found is None:
            say(f"{experiment.name}: {number} of {len(cells)}: {cell.variant}, seed {cell.seed}")
            folder.mkdir(parents=True, exist_ok=True)
            found = cell.work(folder)
            _keep(folder, cell, found)
        rows += found
        if number == len(cells) or kept[number] is None:
            write_rows(path, rows, experiment.name, setting.scale, _device(setting), torch.__version__)
    with matplotlib.rc_context(STYLE):
        figure = experiment.draw(table(rows))
        image = path.with_suffix(".png")
        write_atomically(image, lambda draft: save(figure, draft))
        matplotlib.pyplot.close(figure)
    say(f"{experiment.name}: wrote {path} and {image.name}")
    return path


def _folder(setting: Setting, experiment: Experiment, cell: Cell) -> Path:
    name = "".join(letter if letter.isalnum() or letter in ".=" else "-" for letter in cell.variant)
    return setting.folder / "cells" / experiment.name / f"{name}-seed-{cell.seed}"


def _keep(folder: Path, cell: Cell, rows: list[Row]) -> None:
    content = {"settings": dict(cell.settings), "rows": [list(row) for row in rows]}
    write_atomically(folder / FINISHED, lambda draft: draft.write_text(json.dumps(content, indent=1) + "\n"))


def _kept(folder: Path, cell: Cell) -> list[Row] | None:
    """The rows of a cell that was finished earlier; None if it was not."""
    path = folder / FINISHED
    if not path.exists():
        return None
    try:
        content = read_settings(path)
        settings, rows = dict(content["settings"]), [Row(*row) for row in content["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ExperimentError(f"{path}: expected settings and rows of an experiment, got something else") from error
    if changed := _changed(settings, json.loads(json.dumps(dict(cell.settings)))):
        raise ExperimentError(f"{path} was made with other settings ({changed}): give another --out")
    return rows


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(names[:4])


def _device(setting: Setting) -> str:
    device = setting.world.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
