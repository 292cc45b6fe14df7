"""`python -m verify model`: which cases it plans, what it prints and writes, and its exit status."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from flashjvp.backends import select
from tvm_ref.model import dual
from tvm_ref.model.dual import Dual
from verify import __main__ as command_line
from verify.model import cases as model_cases
from verify.model import command, judge
from verify.model.cases import LONG, LONG_MEMORY, NETWORKS, PARTS, SMALL, ModelCase, model_plan
from verify.model.judge import COLUMNS
from verify.run.judge import Run

FEW = [ModelCase("block"), ModelCase("network"), ModelCase("func.jvp")]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which a run on a CPU sets
    monkeypatch.setenv("COLUMNS", "160")


def in_this_process(cases: Sequence[ModelCase], run: Run, processes: int, *, judge: Any, lost: Any) -> Iterator[Any]:
    """In place of workers.verdicts: no processes, to which what is planted here would be unknown."""
    for case in cases:
        yield case, judge(case, run)[0]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole verification is two cases, in this process."""
    monkeypatch.setattr(command.workers, "verdicts", in_this_process)
    monkeypatch.setattr(
        command, "model_plan", lambda device, quick: model_cases.ModelPlan(device, FEW[:2], ["a reason"])
    )


def test_the_plan_asks_every_question_and_the_quick_one_fewer() -> None:
    full, quick = model_plan("cpu", False), model_plan("cpu", True)
    assert set(quick.cases) < set(full.cases)
    assert len(set(full.cases)) == len(full.cases) == len({case.name for case in full.cases})
    for plan in (full, quick):
        assert {case.part for case in plan.cases} == PARTS.keys()
        assert {case.precision for case in plan.cases if case.part == "tvm"} == {"float64", "float32", "bfloat16"}
        assert {case.recompute for case in plan.cases if case.part == "tvm"} == {"none", "full", "selective"}
    assert {case.network for case in full.cases if case.part == "network"} >= set(SMALL)
    assert set(NETWORKS) - set(SMALL) == {"one block", "XL/2 width", LONG}


@pytest.mark.parametrize("memory", [LONG_MEMORY, LONG_MEMORY - 1])
def test_a_gpu_is_asked_about_triton_inductor_the_width_of_xl_and_if_it_has_the_memory_16384_tokens(
    monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(select, "obstacle", lambda name, device, dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    for quick in (True, False):
        plan = model_plan("cuda", quick)
        cases = plan.cases
        assert (memory >= LONG_MEMORY) == (LONG in {case.network for case in cases})
        assert (memory >= LONG_MEMORY) != any(reason.startswith(f"{LONG}: expected") for reason in plan.skipped)
        trained = [case for case in cases if case.part == "tvm" and case.compiled == "inductor"]
        assert {case.backend for case in trained} == {"triton"}
        assert {case.recompute for case in trained} == {"none", "full", "selective"}
        assert "XL/2 width" in {case.network for case in cases}


def test_inductor_is_left_out_with_a_reason_where_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cases.shutil, "which", lambda name: None)
    plan = model_plan("cpu", False)
    assert not any(case.compiled == "inductor" for case in plan.cases)
    assert any("C++ compiler" in reason for reason in plan.skipped)


@pytest.mark.usefixtures("few")
def test_a_run_writes_every_row_and_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["model", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out: a reason" in out
    assert "all 6 rows held" in out
    (path,) = tmp_path.glob("verify-model-*.csv")
    rows = pd.read_csv(path)
    assert tuple(rows.columns[: len(COLUMNS)]) == COLUMNS
    assert {"machine", "torch_version", "commit"} <= set(rows.columns)
    assert rows["ok"].all() and (rows["error"] <= rows["budget"]).all()


@pytest.mark.usefixtures("few")
def test_a_failing_row_names_the_command_that_judges_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = dual.modulate

    def without_scale_tangent(x: Dual, shift: Dual, scale: Dual) -> Dual:
        return right(x, shift, Dual(scale.value))

    monkeypatch.setattr(dual, "modulate", without_scale_tangent)
    assert command.main(["--device", "cpu", "--seed", "3", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "4 of 6 rows FAILED" in out
    again = next(line.strip() for line in out.splitlines() if "--case network/" in line)
    (path,) = tmp_path.glob("*.csv")
    assert again in set(pd.read_csv(path).query("not ok")["reproduce"])
    assert command.main(shlex.split(again)[4:]) == 1
    assert "2 of 3 rows FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_an_exception_is_a_failing_row_and_with_case_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(judge, "evaluate", broken)
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel"):
        command.main(["--device", "cpu", "--case", FEW[0].name])


def test_cases_are_spread_over_processes_and_rows_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [ModelCase("operators", "one token"), *FEW[:2]]
    monkeypatch.setattr(command, "model_plan", lambda device, quick: model_cases.ModelPlan(device, cases))
    monkeypatch.setattr(command.workers, "count", lambda device: 2)
    monkeypatch.setattr(judge, "evaluate", None)  # would fail here
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "all 7 rows held (3 cases" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    assert list(pd.read_csv(path)["part"]) == ["operators"] + 3 * [cases[1].part] + 3 * [cases[2].part]


def test_a_process_that_dies_is_a_failing_row_and_a_run_that_is_cut_off_leaves_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(cases: Sequence[ModelCase], run: Run, *rest: Any, judge: Any, lost: Any) -> Iterator[Any]:
        yield cases[1], lost(cases[1], run, "its process died: SIGSEGV")
        yield cases[0], judge(cases[0], run)[0]
        raise KeyboardInterrupt

    cases = FEW
    monkeypatch.setattr(command, "model_plan", lambda device, quick: model_cases.ModelPlan(device, cases))
    monkeypatch.setattr(command.workers, "verdicts", cut_off)
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.csv")
    rows = pd.read_csv(path)
    assert list(rows["ok"]) == [True, True, True, False]
    assert list(rows["quantity"][2:]) == ["gradients", "call"] and rows["reason"][3] == "its process died: SIGSEGV"


def test_an_unknown_case_or_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cpu", "--case", "block/of-flats"]) == 2
    assert "no such case" in capsys.readouterr().out
    assert command.main(["--device", f"cuda:{torch.cuda.device_count()}"]) == 2
    assert "GPUs" in capsys.readouterr().out
