"""`make measure-this-gpu`: its steps are commands that exist, a stopped run goes on, and nothing names the machine."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import measure_card
from bench.measure_card import Step

CONSOLE = Console(width=160)


def test_without_a_gpu_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as end:
        measure_card.main(["--out", str(tmp_path / "card")])
    assert end.value.code == 2 and "torch finds no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "card").exists()


def test_its_steps_are_understood_by_the_commands_that_they_name(tmp_path: Path) -> None:
    parsers = {"bench.tune": "bench.tune", "bench.sweep": "bench.options", "verify": "verify.run.command"}
    found = measure_card.steps(tmp_path, "sm_89", 60.0)
    assert {step.command[0] for step in found} == parsers.keys()
    for name, *arguments in (step.command for step in found):
        options = importlib.import_module(parsers[name]).parser().parse_args(arguments)
        assert str(options.out).startswith(str(tmp_path))


def step(tmp_path: Path, status: int, *statuses: int) -> Step:
    """A command that says where it runs, counts its runs, and ends so."""
    (tmp_path / "said.py").write_text(
        f"from pathlib import Path; p = Path({str(tmp_path / 'runs')!r})\n"
        "p.write_text(p.read_text() + 'x' if p.exists() else 'x')\n"
        f"print('in {tmp_path}'); raise SystemExit({status})\n"
    )
    return Step("said", ("said",), statuses or (0,))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("status", "statuses", "is_done"), [(0, (), True), (1, (0, 1), True), (1, (), False)])
def test_a_step_is_run_until_it_is_done_and_not_again(
    status: int, statuses: tuple[int, ...], is_done: bool, here: Path
) -> None:
    for _ in range(2):
        assert measure_card.done(step(here, status, *statuses), here, CONSOLE) is is_done
    assert (here / "runs").read_text() == ("x" if is_done else "xx")
    if is_done:
        assert (here / "said.txt").read_text() == "in ...\n"


def test_paths_and_names_are_taken_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure_card.socket, "gethostname", lambda: "workstation7")
    monkeypatch.setenv("USER", "somebody")
    file = tmp_path / "rows.csv"
    file.write_text(
        f"error,{Path.home()}/x.py on workstation7 for somebody in {sys.prefix}/lib,{measure_card.ROOT}/y\n"
    )
    measure_card.scrub(file)
    text = file.read_text()
    assert text.startswith("error,.../x.py on ... for ... in .../lib,.../y")
    assert not any(word in text for word in (str(Path.home()) + "/", "workstation7", "somebody"))


def test_the_card_is_described_without_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    properties = SimpleNamespace(
        multi_processor_count=128, total_memory=24 << 30, shared_memory_per_block_optin=101_376
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    measure_card.write_card(tmp_path / "card.json", torch.device("cuda", 0))
    known = json.loads((tmp_path / "card.json").read_text())
    assert known["card"] == "NVIDIA GeForce RTX 4090" and known["capability"] == [8, 9]
    assert known["memory_mib"] == 24576 and known["torch"] and known["commit"]
    assert not any(str(Path.home()) in str(value) for value in known.values() if str(Path.home()) != "/")
