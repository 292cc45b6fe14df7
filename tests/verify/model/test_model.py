"""`python -m verify model`: what is right holds, planted bugs are caught, and what is asked, said and written."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashjvp.backends import select
from tvm_ref.model import dual
from tvm_ref.model.dual import Dual
from tvm_ref.objective import loss
from verify import __main__ as command_line
from verify.model import cases as model_cases
from verify.model import command as model
from verify.model import judge as model_judge
from verify.model.cases import NETWORKS, PARTS, SMALL, ModelCase, model_plan
from verify.model.judge import COLUMNS, judge_model
from verify.model.stock_norms import stock_norms
from verify.run.judge import Run

QUICK = [
    *(ModelCase(part) for part in PARTS if part != "operators"),  # type: ignore[arg-type]
    ModelCase("tvm", "as a plain DiT", "float32", "tiled"),
    ModelCase("meanflow", "unconditional", "bfloat16", "tiled", recompute="full"),
    ModelCase("tvm", "class-conditional", "bfloat16", "tiled", recompute="selective"),
    ModelCase("tvm", "one block", "float32", "reference", "aot_eager", "selective"),
    ModelCase("func.jvp", "other sizes", "bfloat16"),
]
Planted = dict[str, Callable[..., Any]]


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
    monkeypatch.setattr(model.workers, "verdicts", in_this_process)
    monkeypatch.setattr(
        model, "model_plan", lambda device, quick: model_cases.ModelPlan(device, QUICK[:2], ["a reason"])
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_what_is_right_holds(case: ModelCase, seed: int) -> None:
    rows = judge_model(case, "cpu", seed)
    assert {row.quantity for row in rows} >= {"gradients"}
    assert [row for row in rows if not row.ok] == []


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["block", "network", "func.jvp", "tvm", "detached", "meanflow"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_what_is_right_holds_on_a_gpu(part: Any, recompute: Any) -> None:
    if part == "func.jvp" and recompute != "none":
        pytest.skip("torch cannot recompute inside its own JVP")
    for precision in ("float32", "bfloat16"):
        rows = judge_model(ModelCase(part, "class-conditional", precision, "triton", recompute=recompute), "cuda", 0)
        assert [row for row in rows if not row.ok] == []


def rms_norm_without_projection(x: Dual, weight: Tensor | None = None, *, eps: float) -> Dual:
    inverse = torch.rsqrt(x.value.square().mean(-1, keepdim=True) + eps)
    y = x.map(lambda part: part * inverse)
    return y if weight is None else y.map(lambda part: part * weight)


def rms_norm_with_constant_tangent(x: Dual, weight: Tensor | None = None, *, eps: float) -> Dual:
    return RIGHT["rms_norm"](x, weight, eps=eps).detach_tangent()


def modulate_without_scale_tangent(x: Dual, shift: Dual, scale: Dual) -> Dual:
    return RIGHT["modulate"](x, shift, Dual(scale.value))


def residual_without_gate_tangent(x: Dual, gate: Dual, branch: Dual) -> Dual:
    return RIGHT["gated_residual"](x, Dual(gate.value), branch)


def residual_of_the_branch_alone(x: Dual, gate: Dual, branch: Dual) -> Dual:
    return RIGHT["gated_residual"](branch, gate, branch)


def exact_gelu(x: Dual) -> Dual:
    return Dual(*torch.func.jvp(F.gelu, (x.value,), (x.tangent,))) if x.tangent is not None else Dual(F.gelu(x.value))


def attention_without_key_tangent(q: Dual, k: Dual, v: Dual, *, backend: str | None) -> Dual:
    return RIGHT["attention"](q, Dual(k.value), v, backend=backend)


def stock_layer_norm(x: Dual, *, eps: float) -> Dual:
    def norm(z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=eps)

    return Dual(norm(x.value)) if x.tangent is None else Dual(*torch.func.jvp(norm, (x.value,), (x.tangent,)))


RIGHT: Planted = {name: getattr(dual, name) for name in ("rms_norm", "modulate", "gated_residual", "attention")}
FAULTS: list[tuple[str, Callable[..., Any], str, set[str]]] = [
    ("rms_norm", rms_norm_without_projection, "class-conditional", {"tangent", "gradients"}),
    ("rms_norm", rms_norm_with_constant_tangent, "class-conditional", {"gradients"}),
    ("modulate", modulate_without_scale_tangent, "class-conditional", {"tangent", "gradients"}),
    ("gated_residual", residual_without_gate_tangent, "class-conditional", {"tangent", "gradients"}),
    ("gated_residual", residual_of_the_branch_alone, "class-conditional", {"value", "tangent", "gradients"}),
    ("gelu", exact_gelu, "class-conditional", {"value", "tangent", "gradients"}),
    ("attention", attention_without_key_tangent, "class-conditional", {"tangent", "gradients"}),
    ("layer_norm", stock_layer_norm, "layer norm", {"gradients"}),
]


@pytest.mark.parametrize(
    ("name", "wrong", "network", "quantities"), FAULTS, ids=[fault[1].__name__ for fault in FAULTS]
)
@pytest.mark.parametrize("part", ["block", "network"])
def test_a_planted_bug_of_a_layer_is_caught_in_what_it_spoils(
    monkeypatch: pytest.MonkeyPatch, part: Any, name: str, wrong: Callable[..., Any], network: str, quantities: set[str]
) -> None:
    monkeypatch.setattr(dual, name, wrong)
    rows = judge_model(ModelCase(part, network), "cpu", 0)
    assert {row.quantity for row in rows if not row.ok} == quantities
    assert not all(row.ok for row in judge_model(ModelCase("tvm", network), "cpu", 0))


@pytest.mark.parametrize("wrong", [rms_norm_with_constant_tangent, stock_layer_norm])
def test_difference_quotients_catch_wrong_gradients_without_the_dense_network(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    """Where the JVP itself is right: one that is wrong may have the gradient that belongs to it."""
    monkeypatch.setattr(dual, "layer_norm" if wrong is stock_layer_norm else "rms_norm", wrong)
    (row,) = judge_model(ModelCase("difference", "layer norm"), "cpu", 0)
    assert not row.ok


def test_a_planted_bug_of_the_objective_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss._guided_velocity

    def slightly_off(target: Any, batch: Any, x: Tensor, *rest: Any) -> Tensor:
        return right(target, batch, x, *rest) + 1e-6 * x

    monkeypatch.setattr(loss, "_guided_velocity", slightly_off)
    for case in (ModelCase("tvm"), ModelCase("meanflow")):
        assert not all(row.ok for row in judge_model(case, "cpu", 0))


def test_a_lost_gradient_through_the_jvp_is_caught_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "attention", lambda q, k, v, backend: RIGHT["attention"](
        q.detach_tangent(), k.detach_tangent(), v.detach_tangent(), backend=backend))  # fmt: skip
    rows = judge_model(ModelCase("network", precision="bfloat16"), "cpu", 0)
    assert {row.quantity for row in rows if not row.ok} == {"gradients"}


@pytest.mark.parametrize("network", SMALL)
def test_no_network_calls_a_norm_of_torch(network: str) -> None:
    (row,) = judge_model(ModelCase("operators", network), "cpu", 0)
    assert row.ok, row.reason


def test_a_network_that_calls_a_norm_of_torch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "layer_norm", stock_layer_norm)
    (row,) = judge_model(ModelCase("operators", "as a plain DiT"), "cpu", 0)
    assert not row.ok
    assert "native_layer_norm" in row.reason
    (row,) = judge_model(ModelCase("operators", "class-conditional"), "cpu", 0)
    assert row.ok


@pytest.mark.parametrize(
    ("norm", "caught"),
    [
        (torch.nn.LayerNorm(4), True),
        (torch.nn.BatchNorm1d(4), True),
        (torch.nn.BatchNorm1d(4).eval(), True),
        (torch.nn.RMSNorm(4), False),
        (torch.nn.GroupNorm(2, 4), False),
    ],
    ids=str,
)
def test_norms_are_seen_plain_under_jvp_and_without_grad(norm: torch.nn.Module, caught: bool) -> None:
    x = torch.randn(3, 4)
    with stock_norms() as plain:
        norm(x)
    with stock_norms() as dual_:
        torch.func.jvp(lambda z: torch.func.functional_call(norm, state(norm), z), (x,), (x,))
    with stock_norms() as inference, torch.no_grad():
        norm(x)
    assert [bool(found) for found in (plain, dual_, inference)] == [caught] * 3


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


def test_the_plan_asks_every_question_and_the_quick_one_fewer() -> None:
    full, quick = model_plan("cpu", False), model_plan("cpu", True)
    assert set(quick.cases) < set(full.cases)
    assert len(set(full.cases)) == len(full.cases) == len({case.name for case in full.cases})
    for plan in (full, quick):
        assert {case.part for case in plan.cases} == PARTS.keys()
        assert {case.precision for case in plan.cases if case.part == "tvm"} == {"float64", "float32", "bfloat16"}
        assert {case.recompute for case in plan.cases if case.part == "tvm"} == {"none", "full", "selective"}
    assert {case.network for case in full.cases if case.part == "network"} >= set(SMALL)
    assert set(NETWORKS) - set(SMALL) == {"one block", "XL/2 width"}


def test_a_gpu_is_asked_about_triton_inductor_and_the_width_of_xl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "obstacle", lambda name, device, dtype: None)
    for quick in (True, False):
        cases = model_plan("cuda", quick).cases
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
    monkeypatch.setattr(dual, "modulate", modulate_without_scale_tangent)
    assert model.main(["--device", "cpu", "--seed", "3", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "4 of 6 rows FAILED" in out
    command = next(line.strip() for line in out.splitlines() if "--case network/" in line)
    (path,) = tmp_path.glob("*.csv")
    assert command in set(pd.read_csv(path).query("not ok")["reproduce"])
    assert model.main(shlex.split(command)[4:]) == 1
    assert "2 of 3 rows FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_an_exception_is_a_failing_row_and_with_case_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(model_judge, "evaluate", broken)
    assert model.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel"):
        model.main(["--device", "cpu", "--case", QUICK[0].name])


def test_cases_are_spread_over_processes_and_rows_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [ModelCase("operators", "one token"), *QUICK[:2]]
    monkeypatch.setattr(model, "model_plan", lambda device, quick: model_cases.ModelPlan(device, cases))
    monkeypatch.setattr(model.workers, "count", lambda device: 2)
    monkeypatch.setattr(model_judge, "evaluate", None)  # would fail here
    assert model.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
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

    cases = [*QUICK[:3]]
    monkeypatch.setattr(model, "model_plan", lambda device, quick: model_cases.ModelPlan(device, cases))
    monkeypatch.setattr(model.workers, "verdicts", cut_off)
    assert model.main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.csv")
    rows = pd.read_csv(path)
    assert list(rows["ok"]) == [True, True, True, False]
    assert list(rows["quantity"][2:]) == ["gradients", "call"] and rows["reason"][3] == "its process died: SIGSEGV"


def test_an_unknown_case_or_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--device", "cpu", "--case", "block/of-flats"]) == 2
    assert "no such case" in capsys.readouterr().out
    assert model.main(["--device", f"cuda:{torch.cuda.device_count()}"]) == 2
    assert "GPUs" in capsys.readouterr().out
