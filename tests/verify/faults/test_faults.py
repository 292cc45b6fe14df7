"""Mutation tests: the checks catch every planted bug, and a crash does not count as caught."""

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
from verify.oracles.identities import IDENTITIES

PACKAGE = Path(flashjvp.__file__).parent
# Stages of faults that are planted by one call of the command, which takes seconds to start.
PARTS = {stage: [stage] for stage in ("pipelines", "repeated calls", "wiring")}
PARTS["the others"] = sorted({fault.stage for fault in FAULTS} - PARTS.keys())


@pytest.mark.parametrize("part", PARTS)
def test_every_fault_is_caught_and_the_unpatched_copy_is_not(
    part: str, tmp_path: Path, sampled: Callable[..., list[str]]
) -> None:
    """In the fast tier some faults of each stage, which the commit chooses."""
    names = [sampled([fault.name for fault in FAULTS if fault.stage == stage], of=8) for stage in PARTS[part]]
    planted = [fault for fault in FAULTS if fault.name in {*chain(*names)}]
    code = command.main(["--out", str(tmp_path), *(word for fault in planted for word in ("--only", fault.name))])
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
    choices |= {"hopper/selfcheck.py", "hopper/triton_compat.py"}
    paths = [path for path in (PACKAGE / "kernels").rglob("*.py") if path.name != "__init__.py"]
    kernels = {str(path.relative_to(PACKAGE)) for path in paths}
    kernels -= {f"kernels/{name}" for name in choices}
    tiled = ("tiled", "tiled_backward", "tiled_grid", "tiled_products")
    backends = {f"backends/{name}.py" for name in (*tiled, "reference", "triton")}
    dispatch = {f"dispatch/{name}.py" for name in ("autograd", "operators", "func_jvp", "fast_path")}
    others = {"_torch/levels.py", "_torch/eager.py", "_torch/guards.py", "causal_bias.py"}
    assert {fault.file for fault in FAULTS} >= kernels | backends | dispatch | others


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_patches_fit_the_source(fault: Fault) -> None:
    assert (PACKAGE / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("return", 5)])
def test_a_patch_that_does_not_fit_is_an_error(old: str, times: int, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("return " * 5)
    with pytest.raises(ValueError, match=f"'rotten': expected '{old}' once in module.py, got it {times} times"):
        command.apply(Fault("rotten", "tiled", "module.py", old, "new"), tmp_path)


def test_only_a_finding_counts_as_caught() -> None:
    """Not a harmless patch, not code that raises, not a process that dies; nor is a check that fails by itself."""
    signature = "def attention(\n"
    harmless = Fault("harmless", "wiring", "api.py", signature, f"# {signature}{signature}")
    raises = Fault("raises", "wiring", "errors.py", '"""The errors', 'raise RuntimeError("as planned")\n"""The errors')
    dies = Fault("dies", "wiring", "errors.py", '"""The errors', '__import__("os")._exit(7)\n"""The errors')
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
        monkeypatch.setattr(command, "run", lambda plan, seed, found=found: iter(found))
        assert command.main([]) == (0 if all(ok) else 1)
        printed = capsys.readouterr().out
        assert ("MISSED" in printed) == (not ok[0])
        assert ("FAILED" in printed) == (not ok[1])


def test_only_names_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "no such fault"])
    assert "no fault is called 'no such fault'" in capsys.readouterr().err
