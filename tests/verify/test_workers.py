"""A process that dies, hangs or loses its device costs its own task a verdict, and no other."""

from verify import workers
from verify.cases import Case
from verify.judge import Run
from verify.plan import FLOAT64, Task

from .planted import judge


def test_what_dies_and_what_hangs_are_failing_rows_and_the_rest_is_judged() -> None:
    names = ("scale_1", "dies", "scale_2", "hangs", "scale_3")
    tasks = [Task(FLOAT64, Case(name, (), 1, 1, 3, 4, 2, 2), "float32", ("tiled",)) for name in names]
    run = Run.here("cpu", 0, "2025-01-01T00:00:00Z")
    found = {task.case.name: rows for task, rows in workers.verdicts(tasks, run, 1, judge, limit_s=40.0)}
    assert list(found) == list(names)
    for name in ("scale_1", "scale_2", "scale_3"):
        assert len(found[name]) == 8
        assert all(row.ok for row in found[name])
    assert [(row.ok, row.reason) for row in found["dies"]] == [(False, "its process died: SIGSEGV")]
    assert [(row.ok, row.reason) for row in found["hangs"]] == [(False, "no verdict within 40 s")]
