"""Mutation tests: the checks catch every planted bug, and a crash does not count as caught."""

import ast
import csv
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

import flashjvp
from verify.checks.emulated import EMULATED
from verify.checks.registry import IN_PYTORCH
from verify.faults import command
from verify.faults.fault import CASE_BY_NAME, EMULATED_CHECKS, Fault
from verify.faults.fault_list import FAULTS
from verify.faults.markers import MarkerError, markers, mutated
from verify.oracles.identities import IDENTITIES

PACKAGE = Path(flashjvp.__file__).parent
# Stages of faults that are planted by one call of the command, which takes seconds to start.
PARTS = {"pipelines": ["pipelines"], "the others": sorted({fault.stage for fault in FAULTS} - {"pipelines"})}


@pytest.mark.parametrize("part", PARTS)
def test_every_fault_is_caught_and_the_unpatched_copy_is_not(
    part: str, tmp_path: Path, sampled: Callable[..., list[str]]
) -> None:
    """In the fast tier some faults of each stage, which the commit chooses."""
    names = [sampled([fault.name for fault in FAULTS if fault.stage == stage], of=36) for stage in PARTS[part]]
    planted = [fault for fault in FAULTS if fault.name in {*chain(*names)}]
    code = command.main(["--out", str(tmp_path), "--only", ",".join(fault.name for fault in planted)])
    with (tmp_path / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["ok"] != "true"] == []
    assert [row["fault"] for row in rows if row["fault"]] == [fault.name for fault in planted] != []
    checks = {(row["check"], row["case"]) for row in rows if not row["fault"]}
    assert checks == {(fault.check, fault.case) for fault in planted}
    assert code == 0


def test_the_list_covers_every_part() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert {fault.case for fault in FAULTS} <= CASE_BY_NAME.keys()
    assert {fault.check for fault in FAULTS} <= {"float64", *IDENTITIES, *IN_PYTORCH, *EMULATED}
    assert {fault.check for fault in FAULTS} >= IN_PYTORCH.keys() | EMULATED.keys()
    assert set(EMULATED_CHECKS) == EMULATED.keys()
    # These choose kernels and tiles, and compute nothing: tests/flashjvp/kernels/test_hopper.py judges the choice.
    choices = {"launch/hopper_tables.py", "launch/schedule.py", "launch/tables.py", "hopper/eligibility.py"}
    # tests/flashjvp/kernels/test_triton_versions.py judges these; what the second makes differs with the Triton.
    choices |= {"launch/selfcheck.py", "hopper/triton_compat.py"}
    choices |= {"launch/compilation.py"}  # tests/flashjvp/test_precompile.py judges that
    choices |= {"launch/replaced.py"}  # for tests, verify and bench alone
    paths = [path for path in (PACKAGE / "kernels").rglob("*.py") if path.name != "__init__.py"]
    kernels = {str(path.relative_to(PACKAGE)) for path in paths}
    kernels -= {f"kernels/{name}" for name in choices}
    tiled = ("tiled", "tiled_backward", "tiled_grid", "tiled_products")
    backends = {f"backends/{name}.py" for name in (*tiled, "reference", "triton")}
    dispatch = {f"dispatch/{name}.py" for name in ("autograd", "operators", "func_jvp", "fast_path", "tangents")}
    others = {"_torch/levels.py", "_torch/eager.py", "_torch/guards.py", "causal_bias.py"}
    assert {fault.file for fault in FAULTS} >= kernels | backends | dispatch | others


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_changes_its_file(fault: Fault) -> None:
    source = (PACKAGE / fault.file).read_text()
    assert ast.dump(ast.parse(mutated(source, fault.marker, fault.statement))) != ast.dump(ast.parse(source))


def test_every_marker_is_used() -> None:
    marked = {
        (str(path.relative_to(PACKAGE)), marker)
        for path in PACKAGE.rglob("*.py")
        for marker in markers(path.read_text())
    }
    assert marked == {(fault.file, fault.marker) for fault in FAULTS}


SOURCE = """
def f(x):  # mutate: def f
    # mutate: y
    y = g(
        x,
    )  # a comment
    return y  # mutate: return
"""


@pytest.mark.parametrize(
    ("marker", "old", "new"),
    [
        ("def f", "def f(x):  # mutate: def f", "def f(x, z):"),
        ("y", "y = g(\n        x,\n    )  # a comment", "y = 1\n    y = 2"),
        ("return", "return y  # mutate: return", "return x"),
    ],
)
def test_a_marked_statement_is_replaced_as_a_whole(marker: str, old: str, new: str) -> None:
    assert mutated(SOURCE, marker, new.replace("\n    ", "\n")) == SOURCE.replace(old, new)


@pytest.mark.parametrize(
    ("source", "said"),
    [("x = 1\n", "no statement is marked 'x'"), ("x = 1  # mutate: x\n" * 2, "two statements are marked 'x'")],
)
def test_a_marker_that_is_not_there_once_is_an_error(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    with pytest.raises(MarkerError, match=f"fault 'rotten', module.py: {said}"):
        command.apply(Fault("rotten", "tiled", "module.py", "x", "x = 2"), tmp_path)


def test_only_a_finding_counts_as_caught() -> None:
    """Not a harmless patch, not code that raises, not a process that dies; nor is a check that fails by itself."""
    file, marker = "_torch/eager.py", "_THREAD"
    harmless = Fault("harmless", "wiring", file, marker, "_THREAD = threading.local()")
    raises = Fault("raises", "wiring", file, marker, 'raise RuntimeError("as planned")')
    dies = Fault("dies", "wiring", file, marker, '__import__("os")._exit(7)')
    verdicts = {v.fault: v for v in command.run(command.planned([harmless, raises, dies]))}
    assert {name: v.ok for name, v in verdicts.items()} == {"": True, "harmless": False, "raises": False, "dies": False}
    assert verdicts["harmless"].failure == ""
    assert verdicts["raises"].failure == "RuntimeError: as planned"
    assert verdicts["dies"].failure == "the process ended with exit code 7"


def test_the_exit_code_and_the_table_tell_of_a_missed_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = command.Verdict("planted", "wiring", "api.py", "float64", "square", "o", 0.5, 1.0, True, "")
    sound = command.Verdict("", "wiring", "api.py", "float64", "square", "o", 0.5, 1.0, True, "")
    for ok in ((True, True), (False, True), (True, False)):
        found = [replace(v, ok=x) for v, x in zip((verdict, sound), ok, strict=True)]
        monkeypatch.setattr(command, "run", lambda plan, seed, found=found: (row for row in found))
        assert command.main([]) == (0 if all(ok) else 1)
        printed = capsys.readouterr().out
        assert ("MISSED" in printed) == (not ok[0])
        assert ("FAILED" in printed) == (not ok[1])


def test_only_names_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "no such fault"])
    assert "'no such fault' is not one of" in capsys.readouterr().err
