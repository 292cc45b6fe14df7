"""A process that dies, hangs or loses its device costs its own task a verdict, and no other."""

from reports.verification import Verdict
from tests.verify.run.failing_judge import judge
from verify.cases.case import Case
from verify.run import workers
from verify.run.judge import Run
from verify.run.plan import FLOAT64, Task


def outcomes(*names: str, limit_s: float = workers.TASK_LIMIT_S) -> dict[str, list[Verdict]]:
    tasks = [Task(FLOAT64, Case(name, (), 1, 1, 3, 4, 2, 2), "float32", ("tiled",)) for name in names]
    run = Run.here("cpu", 0, "2025-01-01T00:00:00Z")
    return {task.case.name: rows for task, rows in workers.verdicts(tasks, run, 1, judge, limit_s)}


def test_a_death_is_a_failing_row_and_the_rest_is_judged() -> None:
    names = ("scale_dies", "scale_1", "scale_lost", "scale_2")
    found = outcomes(*names)
    assert list(found) == list(names)
    assert [(row.ok, row.reason) for row in found["scale_dies"]] == [(False, "its process died: SIGSEGV")]
    for name in names[1:]:
        assert len(found[name]) == 8
        assert all(row.ok for row in found[name])


def test_what_hangs_is_ended() -> None:
    (row,) = outcomes("scale_hangs", limit_s=0.5)["scale_hangs"]
    assert (row.ok, row.reason) == (False, "no verdict within 0.5 s")
