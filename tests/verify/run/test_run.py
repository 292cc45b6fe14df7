"""`python -m verify`: exit status, the command that reproduces a row, what is written and what is said."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from reports.verification import COLUMNS
from verify import __main__ as command_line
from verify.cases.catalogue import CASES
from verify.faults import command as faults_command
from verify.oracles import attention
from verify.oracles.attention import NAMES
from verify.run import command, workers
from verify.run.judge import Run, judge_all
from verify.run.plan import (
    BACKENDS,
    CHECKS,
    DTYPES,
    GROUPS,
    SAMPLE,
    STRUCTURES,
    SURROUNDED,
    TF32,
    Plan,
    UnknownCaseError,
    random_cases,
    sweep_cases,
)

ROOT = Path(__file__).resolve().parents[3]
ALONE = ("--device", "cpu", "--case", "gqa", "--backend", "tiled", "--dtype", "float32")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which a run on a CPU sets
    monkeypatch.setenv("COLUMNS", "160")


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every result of a backend wrong in d_k_t."""
    right = attention.run

    def wrong(inputs: Any, backend: Any = None) -> attention.Results:
        results = right(inputs, backend)
        return results if results.d_k_t is None else replace(results, d_k_t=1.5 * results.d_k_t)

    monkeypatch.setattr(attention, "run", wrong)


def in_process(tasks: Any, of: Run, processes: int) -> Any:
    """In place of workers.verdicts: no processes."""
    return ((task, judge_all(task, of)[0]) for task in tasks)


@pytest.fixture
def three_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole verification is three checks."""
    everything = Plan.everything

    def few(plan: Plan) -> Plan:
        everything(plan)
        plan.tasks = [task for task in plan.tasks if task.name in ("gqa", "length_16", "adjoint:gqa")]
        return plan

    monkeypatch.setattr(Plan, "everything", few)
    monkeypatch.setattr(workers, "verdicts", in_process)


def test_the_status_is_0_when_everything_held(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(ALONE) == 0
    assert "all 8 rows held" in capsys.readouterr().out


def test_a_failing_row_comes_first_with_the_command_that_reproduces_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch)
    assert command.main((*ALONE, "--seed", "7")) == 1
    out = capsys.readouterr().out
    expected = "python -m verify --device cpu --case gqa --backend tiled --dtype float32 --seed 7"
    assert out.index("gqa  tiled  float32  d_k_t") < out.index(expected) < out.index("relative error against float64")
    assert "1 of 8 rows FAILED" in out
    assert command.main(shlex.split(expected)[3:]) == 1
    assert "1 of 8 rows FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("three_checks")
def test_a_whole_run_writes_every_row_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--device", "cpu", "--backend", "tiled,reference", "--dtype", "float32", "--out", str(tmp_path))
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv.gz")
    data = pd.read_csv(path)
    assert tuple(data.columns) == COLUMNS
    assert len(data) == 2 * (8 + 8 + 2)
    assert set(data["quantity"][data["check"] == "float64"]) == set(NAMES)
    assert data["ok"].all()
    assert (data["error"] <= data["budget"]).all()
    assert [figure.name for figure in tmp_path.glob("*.png")] == [f"{path.name.removesuffix('.csv.gz')}-length.png"]
    assert f"all {len(data)} rows held" in out
    assert max(map(len, out.splitlines())) <= 160 + len(str(tmp_path))
    spoil(monkeypatch)
    path.unlink()
    assert command.main(arguments) == 1
    (path,) = tmp_path.glob("*.csv.gz")
    failing = pd.read_csv(path).query("not ok")
    assert set(failing["quantity"]) == {"d_k_t"}
    assert len(failing) == 4
    assert all(command in capsys.readouterr().out for command in failing["reproduce"][:1])


@pytest.mark.usefixtures("three_checks")
def test_an_exception_is_a_failing_row_and_with_case_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(inputs: Any, backend: Any = None) -> attention.Results:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "run", broken)
    assert command.main((*ALONE[:2], *ALONE[4:], "--out", str(tmp_path))) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel"):
        command.main(ALONE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "gqaa"), "cases like it: gqa"),
        (("--case", "ajoint:gqa"), "CHECK one of adjoint"),
        (("--case", "gradcheck:gqa"), "cases like it: tiny_gqa_mask"),
        (("--case", "adjoint:plain"), "nothing to verify"),
        (("--case", "gqa", "--backend", "triton", "--dtype", "float64"), "expected float16, bfloat16 or float32"),
        (("--case", "gradcheck:tiny_causal", "--dtype", "float16"), "nothing to verify"),
    ],
)
def test_nothing_to_verify_is_no_success(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(("--device", "cpu", *arguments)) == 2
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [("--backend", "a"), ("--dtype", "int8"), ("--device", "tpu"), ("--seed", "x")])
def test_a_wrong_option_is_said(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_command_of_another_module_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: list[str]) -> int:
        given.append(arguments)
        return 5

    given: list[list[str]] = []
    monkeypatch.setattr(faults_command, "main", main)
    assert command_line.main(["faults", "--only", "x"]) == 5
    assert given == [["--only", "x"]]


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "verify", "--device", "cpu", "--case", "dims_1_1", "--backend", "triton,reference"]
    ended = subprocess.run([*command, "--dtype", "float64"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "left out: triton in float64" in ended.stdout
    assert "all 8 rows held" in ended.stdout


EXACT = [dtype for dtype in DTYPES if dtype != TF32]


def planned(quick: bool) -> Plan:
    return Plan("cpu", quick, BACKENDS, list(DTYPES), 0).everything()


@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_has_every_case_check_backend_and_type(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = planned(quick)
    pairs = {(task.check, task.case.name, backend, task.dtype) for task in plan.tasks for backend in task.backends}
    assert len(pairs) == sum(len(task.backends) for task in plan.tasks)
    for backend in ("reference", "tiled"):
        judged = {(name, dtype) for check, name, of, dtype in pairs if (check, of) == ("float64", backend)}
        assert {(name, dtype) for name in SAMPLE for dtype in EXACT} <= judged
        rest = {case.name for case in CASES} - {*SAMPLE}
        assert rest <= {name for name, _ in judged}
        assert quick or {(name, dtype) for name in rest for dtype in EXACT} <= judged
        assert {dtype for name, dtype in judged if name in rest} == {*EXACT}
    wide = {case.name for case in CASES if max(case.d, case.dv) > 256}
    assert wide and not [name for _, name, backend, _ in pairs if backend == "triton" and name in wide]
    interpreted = SAMPLE if quick else [case.name for case in CASES if case.name not in wide]
    assert {("float64", name, "triton", dtype) for name in interpreted for dtype in ("float32", "float16")} <= pairs
    assert {task.check for task in plan.tasks} == {"float64", *CHECKS}
    assert {task.group for task in plan.tasks} >= set(GROUPS.values()) - {
        "error against length", "error against head dim", "error against scores"
    }  # fmt: skip
    assert any("triton in bfloat16" in reason for reason in plan.skipped)
    assert any("tiled in tf32: float32 products are rounded on a GPU only" in reason for reason in plan.skipped)
    assert any("quick: triton on" in reason for reason in plan.skipped) == quick


def test_a_gpu_has_a_sample_in_tf32_and_all_cases_where_nothing_else_is_asked_for() -> None:
    for dtypes, names in ((list(DTYPES), SAMPLE), ([TF32], [case.name for case in CASES])):
        plan = Plan("cuda", False, ("reference", "tiled"), dtypes, 0).everything()
        of_tf32 = {task.case.name for task in plan.tasks if task.dtype == TF32 and task.check == "float64"}
        assert {name for name in of_tf32 if not name.startswith("random")} == {*names}
        assert any("tf32 on" in reason for reason in plan.skipped) == (len(dtypes) > 1)


def test_every_task_can_be_named_again() -> None:
    plan = planned(quick=False)
    for task in plan.tasks[::7]:
        again = Plan("cpu", False, task.backends, [task.dtype], 0).only(task.name)
        assert again.tasks == [task]


def test_cases_are_named_once_and_samples_exist() -> None:
    names = [case.name for case in (*CASES, *random_cases(0), *sweep_cases("cpu"))]
    assert len(set(names)) == len(names)
    assert {*SAMPLE, *STRUCTURES, *SURROUNDED} <= set(names)
    assert all(name.split("_")[0] in GROUPS for name in names)
    with pytest.raises(UnknownCaseError):
        Plan("cpu", False, BACKENDS, list(DTYPES), 0).only("random_4000")


def test_random_cases_depend_on_the_seed_alone() -> None:
    assert random_cases(5) == random_cases(5) != random_cases(6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(("--device", "cuda", "--case", "gqa")) == 2
    assert "finds 0 GPUs" in capsys.readouterr().out
