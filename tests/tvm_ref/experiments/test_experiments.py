"""The runner of experiments: what is finished is kept, what is missing is done, and files are whole."""

import csv
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from flashjvp_commands.ending import Stopped, status_of
from tvm_ref.experiments import __main__ as command
from tvm_ref.experiments import runner, training
from tvm_ref.experiments.catalogue import NAMES, experiment
from tvm_ref.experiments.cells import Cell, Experiment, Setting
from tvm_ref.experiments.drawing import panels
from tvm_ref.experiments.memory import STEP
from tvm_ref.experiments.results import COLUMNS, REAL, Row, last_steps, read_table, summary, table
from tvm_ref.training.parallel import World
from tvm_ref.training.presets import PRESETS
from tvm_ref.training.step import NonFiniteError

NAN = float("nan")
QUICK = "target"  # of all experiments the one that takes least


def setting(folder: Path) -> Setting:
    return Setting(scale="quick", world=World(0, 1, torch.device("cpu")), folder=folder, data_path="")


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def run_command(names: str, scale: str, out: Path) -> int:
    return status_of(lambda: command.main([names, "--scale", scale, "--device", "cpu", "--out", str(out)]))


def made_up(work: Callable[[int], list[Row]], settings: int = 1, count: int = 3) -> Experiment:
    """An experiment of some cells without training."""

    def cells(_: Setting) -> list[Cell]:
        return [
            Cell(variant=f"cell {i}", seed=i, settings={"setting": settings}, work=lambda folder, i=i: work(i))
            for i in range(count)
        ]

    def draw(_: Any) -> Figure:
        return panels(1)[0]

    return Experiment(name="made-up", question="?", cells=cells, draw=draw)


def row(i: int) -> list[Row]:
    return [Row(f"cell {i}", i, 5, NAN, 1, 1.5, "figure, with a comma", i / 3)]


def test_what_is_finished_is_kept_when_it_is_stopped_and_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work(i: int) -> list[Row]:
        if i == 1 and done.count(1) == 0:
            done.append(i)
            raise Stopped(signal.SIGINT)
        done.append(i)
        return row(i)

    with pytest.raises(Stopped):
        runner.run(made_up(work), setting(tmp_path), lambda text: None)
    assert [x["variant"] for x in rows_in(tmp_path / "made-up.csv")] == ["cell 0"]
    assert not (tmp_path / "made-up.png").exists()
    path = runner.run(made_up(work), setting(tmp_path), lambda text: None)
    assert done == [0, 1, 1, 2]
    found = rows_in(path)
    assert [(x["seed"], x["figure"], x["seconds"], x["w"]) for x in found] == [
        (str(i), "figure, with a comma", "", "1.5") for i in range(3)
    ]
    assert {(x["experiment"], x["scale"], x["torch"]) for x in found} == {("made-up", "quick", torch.__version__)}
    before = path.read_bytes()
    runner.run(made_up(work), setting(tmp_path), lambda text: None)
    assert done == [0, 1, 1, 2] and path.read_bytes() == before
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".*"))


def test_cells_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    runner.run(made_up(row), setting(tmp_path), lambda text: None)
    with pytest.raises(runner.ExperimentError, match=r"other settings \(setting\): give another --out"):
        runner.run(made_up(row, settings=2), setting(tmp_path), lambda text: None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "rows": [[1]]}', "\0"])
def test_a_file_that_is_no_cell_is_named(content: str, tmp_path: Path) -> None:
    runner.run(made_up(row), setting(tmp_path), lambda text: None)
    path = next(tmp_path.rglob(runner.FINISHED))
    path.write_text(content)
    with pytest.raises(ValueError, match=r"finished\.json|expected JSON"):
        runner.run(made_up(row), setting(tmp_path), lambda text: None)


def test_an_experiment_from_the_command_line_ends_and_has_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(QUICK, "quick", tmp_path) == 0
    table_of = read_table(tmp_path / f"{QUICK}.csv")
    assert tuple(table_of.columns) == COLUMNS
    assert set(table_of["variant"]) == {REAL, "0", "0.9", "0.99", "0.999"}
    assert table_of["value"].notna().all()
    before = (tmp_path / f"{QUICK}.csv").read_bytes()
    monkeypatch.setattr(training, "train_until", None)
    assert run_command(QUICK, "quick", tmp_path) == 0
    assert (tmp_path / f"{QUICK}.csv").read_bytes() == before
    assert run_command(QUICK, "small", tmp_path) == 1  # the same folder at another scale


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != QUICK])
def test_every_experiment_works(name: str, tmp_path: Path) -> None:
    assert run_command(name, "quick", tmp_path) == 0
    assert len(rows_in(tmp_path / f"{name}.csv")) >= 4 and (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a loaded machine
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_ends_at_small_scale(name: str, tmp_path: Path) -> None:
    assert run_command(name, "small", tmp_path) == 0
    found = read_table(tmp_path / f"{name}.csv")
    once = found["variant"].str.endswith(STEP)  # a time and a peak, of one seed
    variants = found[(found["variant"] != REAL) & ~once].groupby("variant")["seed"].nunique()
    assert variants.min() == variants.max() and (found["figure"] != "diverged").all()


def test_the_catalogue_has_every_experiment_by_its_name() -> None:
    assert [experiment(name).name for name in NAMES] == list(NAMES)


def plan(seconds: dict[str, float] | None = None, **changes: Any) -> training.Plan:
    fields: dict[str, Any] = {
        "base": training.with_settings(PRESETS["squares"](), {"run.steps": 100}),
        "variants": {"one": {}, "two": {"loss.detach": True}},
        "seeds": 2,
        "measure": lambda trained: [training.Measured("figure", 1.0, 4, 1.5)],
        "measured_with": {"samples": 10},
        "seconds_per_step": seconds,
    }
    return training.Plan(**fields | changes)


def test_cells_have_the_settings_of_their_variant_and_seed(tmp_path: Path) -> None:
    found = training.cells(plan(floor=lambda seed: []), setting(tmp_path))
    assert [(cell.variant, cell.seed) for cell in found] == [
        (name, seed) for seed in (0, 1) for name in (REAL, "one", "two")
    ]
    assert [found[i].settings["loss"]["detach"] for i in (1, 2)] == [False, True]
    assert [found[i].settings["run.seed"] for i in (1, 4)] == [0, 1]


def test_runs_of_equal_time_have_as_many_steps_as_that_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"one": 0.4, "two": 0.1, "three": 9e9}
    assert training.steps_in_equal_time(100, costs) == {"one": 100, "two": 400, "three": 1}
    asked: list[tuple[int, bool]] = []

    def train_until(step: int, config: Any, folder: Path, world: World) -> Any:
        asked.append((step, config.loss.detach))
        return None

    monkeypatch.setattr(training, "train_until", train_until)
    cells = training.cells(plan({"one": 0.4, "two": 0.1}, at=(0.5, 1.0), seeds=1), setting(tmp_path))
    rows = [found for cell in cells for found in cell.work(tmp_path)]
    assert asked == [(50, False), (100, False), (200, True), (400, True)]
    assert [found.seconds for found in rows] == pytest.approx([20, 40, 20, 40])
    assert [found.step for found in rows] == [50, 100, 200, 400] and rows[0].nfe == 4


def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_until(*_: Any) -> Any:
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(training, "train_until", train_until)
    (only,) = training.cells(plan(variants={"one": {}}, seeds=1), setting(tmp_path))[0].work(tmp_path)
    assert (only.figure, only.value, only.step) == ("diverged", 1.0, 100)
    assert "nan" in (tmp_path / "not-finite.txt").read_text()


def test_a_signal_in_training_stops_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        signal = signal.SIGTERM

        def __init__(self, *_: Any) -> None: ...

        def run(self) -> bool:
            return False

    monkeypatch.setattr(training, "Trainer", Fake)
    cell = training.cells(plan(seeds=1), setting(tmp_path))[0]
    with pytest.raises(Stopped) as stopped:
        cell.work(tmp_path)
    assert stopped.value.number == signal.SIGTERM


def test_tables_have_means_over_seeds_of_the_last_steps() -> None:
    rows = [Row("one", seed, step, NAN, 1, NAN, "x", seed + step) for seed in (0, 1) for step in (1, 2 + seed)]
    found = summary(last_steps(table(rows)), "variant")
    assert found.to_dict("records") == [{"variant": "one", "mean": 3.0, "std": pytest.approx(2**0.5), "count": 2}]
    assert summary(table(rows[:1]), "variant")["std"].tolist() == [0]
