"""Steps that are traced: their files, and what stands in where there is no GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tvm_ref.runs import toy, train
from tvm_ref.training.config import ConfigError, RunConfig
from tvm_ref.training.tracing import Tracing


def test_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    printed = train(toy(tmp_path, steps=4, profile=(2, 3)))
    path = tmp_path / "profile/steps-2-3.json"
    assert f"written: {path}" in printed
    events = json.loads(path.read_text())["traceEvents"]
    updates = [event for event in events if "Optimizer.step" in str(event.get("name"))]
    assert len({event["ts"] for event in updates}) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "settings", [pytest.param({"profile": (4, 9)}, marks=pytest.mark.slow), {"profile": (8, 9), "memory_snapshot": 9}]
)
def test_a_run_that_ends_before_writes_no_trace(tmp_path: Path, settings: dict[str, Any]) -> None:
    train(toy(tmp_path, steps=4, **settings))
    assert not (tmp_path / "profile").exists()


def test_without_a_gpu_it_is_said_that_no_memory_is_recorded(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    assert "run.memory_snapshot: nothing is recorded, since there is no GPU" in train(
        toy(tmp_path, steps=3, memory_snapshot=2)
    )


def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def record(enabled: str | None = "all", **_: Any) -> None:
        calls.append(enabled)

    def dump(name: str) -> None:
        Path(name).write_bytes(b"snapshot")
        calls.append("dump")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump, raising=False)
    return calls


def test_allocations_of_a_step_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = with_a_gpu(monkeypatch)
    said: list[str] = []
    with Tracing(RunConfig(steps=9, batch=1, out=str(tmp_path), memory_snapshot=2), said.append) as tracing:
        for step in (1, 2, 3):
            tracing.before(step)
            tracing.after(step)
    assert calls[:3] == ["all", "dump", None]
    path = tmp_path / "profile/memory-step-2.pickle"
    assert path.read_bytes() == b"snapshot" and said == [f"written: {path}"]


def test_a_pytorch_without_the_record_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch)
    monkeypatch.delattr(torch.cuda.memory, "_record_memory_history")
    said: list[str] = []
    with Tracing(RunConfig(steps=9, batch=1, out=str(tmp_path), memory_snapshot=1), said.append) as tracing:
        tracing.before(1)
        tracing.after(1)
    assert said == ["run.memory_snapshot: nothing is recorded, since this PyTorch has no record of allocations"]


@pytest.mark.parametrize("steps", [(0, 1), (3, 2), (-1, 5)])
def test_steps_that_make_no_sense_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"run\.profile: expected two steps"):
        RunConfig(steps=1, batch=1, out="x", profile=steps)
