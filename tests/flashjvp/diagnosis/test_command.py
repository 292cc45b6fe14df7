"""`python -m flashjvp.check`: exit codes, what it prints, the JSON, and that the function of that name stays one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashjvp
from flashjvp.diagnosis import command, table

ROOT = Path(__file__).resolve().parents[3]
MADE = "tests.flashjvp.diagnosis.made"


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert command.main([f"{MADE}:right"]) == 0
    assert command.main([f"{MADE}:wrong", "--json", str(file)]) == 1
    assert "layer norm" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["ok"] is False and report["detached"] is False
    (as_it_is,) = report["diagnoses"]
    assert [found["path"] for found in as_it_is["findings"]] == ["1"]
    assert command.main([f"{MADE}:wrong", "--detached"]) == 0
    assert command.main([f"{MADE}:wrong", "--replaced"]) == 0
    assert "within replaced(): right" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source",
    [
        "made", ":right", f"{MADE}:", f"{MADE}:nothing", f"{MADE}:number", "no_such_module:f", f"{MADE}:raises",
        f"{MADE}:only_a_model", f"{MADE}:of_other_shapes", f"{MADE}:of_many_lines",
    ],
)  # fmt: skip
def test_bad_usage_is_one_line(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([source]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("python -m flashjvp.check: ") and printed.err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "README.md").write_text("kept")
    for name in ("no/report.json", "folder.json", "README.md"):
        assert command.main([f"{MADE}:stopped", "--json", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert "--json: expected" in said or "exists and was not written by this command" in said
    assert (tmp_path / "README.md").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "folder.json"]


def test_an_earlier_report_stays_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(earlier := '{\n  "ok": true\n}\n')
    assert command.main([f"{MADE}:of_other_shapes", "--json", str(file)]) == 2
    assert command.main([f"{MADE}:stopped", "--json", str(file)]) == 130
    assert capsys.readouterr().err.endswith(": stopped\n")
    assert file.read_text() == earlier and [*tmp_path.iterdir()] == [file]


def test_without_rich_the_text_is_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich.console", "rich.markup", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    found = flashjvp.Finding("layer norm", "blocks.0.norm1", "LayerNorm", "wrong", 1, "what to do")
    other = flashjvp.Finding("layer norm", "blocks.12.norm1", "LayerNorm", "wrong", 2, "what to do")
    off = flashjvp.Comparison("JVP", "wrong", 0.25, 1e-9)
    report = flashjvp.CheckReport(False, (flashjvp.Diagnosis("as it is", (found, other), (off,)),))
    table.show(report)
    assert capsys.readouterr().out.splitlines() == [
        "as it is: NOT right",
        "  wrong     layer norm at blocks.*.norm1 (LayerNorm) (3 calls)",
        "            what to do",
        "  JVP: wrong, 2.5e-01 off float64 differences (uncertain by 1e-09)",
    ]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_as_a_program() -> None:
    done = run("-W", "error::RuntimeWarning", "-m", "flashjvp.check", f"{MADE}:wrong")
    assert done.returncode == 1 and "layer norm" in done.stdout and "Traceback" not in done.stderr


def test_without_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "module:function" in said and len(said.splitlines()) == 1


@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("imports", [
    "import flashjvp.check", "import flashjvp; import flashjvp.check", "import flashjvp.check; import flashjvp",
    "import flashjvp, importlib; importlib.import_module('flashjvp.check')",
])  # fmt: skip
def test_the_name_is_the_function_in_any_order_of_imports(imports: str) -> None:
    program = f"{imports}\nimport flashjvp\nfrom flashjvp import check\n" + (
        "assert callable(flashjvp.check) and flashjvp.check is check and check.__name__ == 'check'"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
