"""Rows of an experiment: one for each figure that was measured, in a CSV file that is complete or absent."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..training.files import write_atomically

REAL = "real data"  # the variant that is no network: what real samples get, drawn with replacement or anew


class Row(NamedTuple):
    """A figure. NaN, an empty cell of the CSV: it does not depend on that.

    step: optimizer steps of the network; seconds: its training time, where it was measured; nfe: network evaluations
    for a sample, 0 where it does not depend on them; w: guidance scale of sampling.
    """

    variant: str
    seed: int
    step: int
    seconds: float
    nfe: int
    w: float
    figure: str
    value: float


COLUMNS = ("experiment", "scale", *Row._fields, "device", "torch")


def write_rows(path: Path, rows: Iterable[Row], experiment: str, scale: str, device: str, torch: str) -> None:
    """Writes the rows, each with the experiment, its scale, and what it ran on."""

    def write(draft: Path) -> None:
        with draft.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([experiment, scale, *map(_cell, row), device, torch] for row in rows)

    write_atomically(path, write)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a table with the columns of `Row`."""
    return pd.DataFrame(rows, columns=list(Row._fields))


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV file."""
    return pd.read_csv(path, dtype={"variant": str, "figure": str})


def chosen(rows: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for name, value in values.items():
        rows = rows[rows[name] == value]
    return rows


def last_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every variant and seed the rows of its last step."""
    return rows[rows["step"] == rows.groupby(["variant", "seed"])["step"].transform("max")]


def summary(rows: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Mean, standard deviation over seeds (0 of one), and number of the values, for each value of the columns `by`."""
    found = rows.groupby(by, sort=False)["value"].agg(["mean", "std", "count"]).fillna({"std": 0.0})
    return found.reset_index()
