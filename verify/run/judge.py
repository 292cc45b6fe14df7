"""Judges a task: runs its check on each backend, one row for each quantity. This is what a worker process does."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flashjvp_commands.entry import program
from reports import environment
from reports.verification import Verdict

from ..budget.tolerance import Budgets, budget, check
from ..cases.case import Case
from ..cases.inputs import Inputs, make_inputs
from ..oracles.attention import Backend, Results, Subject, dense64, dense_same_type
from .plan import CHECKS, DTYPES, FLOAT64, TF32, Task


@dataclass(frozen=True)
class Run:
    """What all rows of a run share: seed, device and the environment columns."""

    seed: int
    device: str
    columns: dict[str, str]

    @classmethod
    def here(cls, device: str, seed: int, start: str) -> "Run":
        """A run on this machine that started at `start` (UTC)."""
        on = torch.device(device)
        columns = {
            "run": start,
            "device": on.type,
            "machine": environment.machine(on),
            "driver": environment.driver(on),
            "torch_version": torch.__version__,
            "triton_version": environment.version("triton"),
            "commit": environment.commit(),
        }
        return cls(seed, device, columns)


def judge(task: Task, run: Run, backend: Backend) -> list[Verdict]:
    """The verdicts on one backend of a task; whatever it raises is raised."""
    subject = Subject(backend)
    with products_of(task.dtype):
        if task.check == FLOAT64:
            return against_float64(task, run, subject)
        inputs = make_inputs(task.case, DTYPES[task.dtype], run.device, run.seed)
        found = CHECKS[task.check](inputs, subject)
    return [
        _row(task, run, backend, x.quantity, error=x.error, budget=x.budget, ok=x.ok, reason=x.reason or _why(x.ok))
        for x in found
    ]


@contextlib.contextmanager
def products_of(dtype: str) -> Iterator[None]:
    """PyTorch's precision setting as a type of the plan wants it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == TF32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def against_float64(task: Task, run: Run, subject: Subject) -> list[Verdict]:
    """One row for each output and gradient of a case."""
    assert subject.backend is not None
    inputs, exact, budgets = _oracle(task.case, task.dtype, run.device, run.seed)
    rows = check(subject.results(inputs), exact, budgets)
    return [
        _row(
            task, run, subject.backend, row.tensor, error=row.frobenius, budget=row.frobenius_budget,
            worst_row=row.worst_row, worst_row_budget=row.worst_row_budget, dense_error=row.dense_frobenius,
            ratio_to_dense=row.ratio_to_dense, ok=row.ok, reason=_why(row.ok),
        )
        for row in rows
    ]  # fmt: skip


def judge_all(task: Task, run: Run) -> tuple[list[Verdict], bool]:
    """The verdicts on every backend of a task, and whether the process may go on to another.

    An exception is a failing row; --case shows where it came from. After one that costs the process its GPU context
    nothing else can be judged here.
    """
    rows: list[Verdict] = []
    for i, backend in enumerate(task.backends):
        try:
            rows += judge(task, run, backend)
        except torch.AcceleratorError as error:
            lost = failed(task, run, f"{type(error).__name__}: {error}", task.backends[i])
            others = [failed(task, run, "the GPU context was lost before its turn", b) for b in task.backends[i + 1 :]]
            return [*rows, lost, *others], False
        except Exception as error:
            rows.append(failed(task, run, f"{type(error).__name__}: {error}", backend))
    if torch.device(run.device).type == "cuda":
        torch.cuda.empty_cache()  # memory is shared with the other processes
    return rows, True


def failed(task: Task, run: Run, reason: str, backend: Backend) -> Verdict:
    """The failing row of a backend that came to no verdict."""
    return _row(task, run, backend, "call", ok=False, reason=" ".join(reason.split())[:300])


def command(task: Task, run: Run, backend: Backend) -> str:
    """The command that judges one row alone."""
    what = f"--case {task.name} --backend {backend} --dtype {task.dtype} --seed {run.seed}"
    return f"{program('verify')} --device {run.device} {what}"


@functools.lru_cache(maxsize=1)
def _oracle(case: Case, dtype: str, device: str, seed: int) -> tuple[Inputs, Results, Budgets]:
    """Inputs, exact results and budgets of a case, by which all backends are judged."""
    inputs = make_inputs(case, DTYPES[dtype], device, seed)
    exact = dense64(inputs)
    return inputs, exact, budget(inputs, exact, dense_same_type(inputs))


def _why(ok: bool) -> str:
    return "" if ok else "outside the error budget"


def _row(task: Task, run: Run, backend: Backend, quantity: str, **measured: Any) -> Verdict:
    case = task.case
    return Verdict(
        check=task.check,
        group=task.group,
        case=case.name,
        backend=backend,
        dtype=task.dtype,
        quantity=quantity,
        queries=case.m,
        keys=case.n,
        head_dim=case.d,
        value_dim=case.dv,
        magnitude=case.magnitude,
        seed=run.seed,
        reproduce=command(task, run, backend),
        **measured,
        **run.columns,  # type: ignore[arg-type]
    )
