"""The logs of a run: metrics.csv, TensorBoard and the terminal."""

import csv
import io
import itertools
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from tvm_ref.training.logger import Board, Live, MetricsError, MetricsFile, Row

ROWS = [Row(step, 1 / 3 + step, 0.1 * step, 1e-30, 2.5, 1e-4) for step in range(1, 6)]


def write(path: Path, step: int, rows: list[Row]) -> None:
    file = MetricsFile(path, step)
    for row in rows:
        file.write(row)
    file.to_disk()
    file.close()


def test_numbers_are_written_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, 0, ROWS)
    header, *lines = path.read_text().splitlines()
    assert header.split(",") == list(Row._fields)
    assert [Row(int(line.split(",")[0]), *map(float, line.split(",")[1:])) for line in lines] == ROWS


@pytest.mark.parametrize("torn", ["", "5,0.25,0.1", "6,1.0,1.0,1.0,1.0,1.0\n7"])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_going_on_cuts_later_and_torn_rows(tmp_path: Path, step: int, torn: str) -> None:
    path, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    write(whole, 0, ROWS)
    write(path, 0, ROWS[:4])
    with path.open("a") as stream:
        stream.write(torn)
    write(path, step, ROWS[step:])
    assert path.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "whole.csv"}


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("name,price\nbread,3\n")
    with pytest.raises(MetricsError, match=r"metrics\.csv is no metrics file .* expected the columns step, loss"):
        MetricsFile(path, 0)
    assert path.read_text() == "name,price\nbread,3\n"


@pytest.mark.timeout(60)  # to open a FIFO waits for ever
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fifo", "expected a regular file"),
        ("folder", "expected a regular file"),
        (b"\x93\x9b\xff", "is no metrics file"),
        (",".join(Row._fields).encode() + b"\n\xff\xfe,1\n", "damaged: expected rows that start with a step, got"),
        (",".join(Row._fields).encode() + b"\n1e5,1\n", "damaged: expected rows that start with a step, got '1e5,1"),
    ],
)
def test_what_is_no_metrics_file_is_named(kind: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    if isinstance(kind, bytes):
        path.write_bytes(kind)
    else:
        (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    with pytest.raises(MetricsError, match=rf"metrics\.csv.*{message}"):
        MetricsFile(path, 0)
    assert not isinstance(kind, bytes) or path.read_bytes() == kind


def test_a_row_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv", 0)
    file.close()
    file._stream = open("/dev/full", "w")  # noqa: SIM115  closing it fails too
    file._writer = csv.writer(file._stream)
    with pytest.raises(MetricsError, match="No space left on device"):
        file.write(ROWS[0])
    with pytest.raises(MetricsError, match=r"metrics\.csv cannot be written"):
        file.to_disk()
    with pytest.raises(MetricsError, match=r"metrics\.csv cannot be written"):
        file.close()


def test_tensorboard_shows_what_was_written_and_hides_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, rows in ((0, ROWS), (2, ROWS[2:3])):
        board = Board(tmp_path, step)
        for row in rows:
            board.write(row.step, row._asdict())
        board.close()
        time.sleep(1)  # files are read by name, which starts with the second: a run that goes on is later than that
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert set(events.Tags()["scalars"]) == {*Row._fields}


def test_a_terminal_shows_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(start=100.0, step=0.5)
    monkeypatch.setattr("tvm_ref.training.logger.time.perf_counter", lambda: next(clock))
    printed = io.StringIO()
    live = Live(Console(file=printed, width=200), 0, 5, batch=32)
    assert [live.write(row) for row in ROWS] == [64.0] * 5  # 32 images in half a second
    live.close()
    last = printed.getvalue().splitlines()[-1]
    for shown in ("step 5/5", "64 images/s", "velocity 0.5", "flow 1e-30", "gradient 2.5", "GiB"):
        assert shown in last
