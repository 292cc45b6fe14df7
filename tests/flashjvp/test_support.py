"""The support table is that of the README, of the pins and of CI, and `python -m flashjvp` prints it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashjvp import __main__ as command
from flashjvp import support
from flashjvp.kernels.launch import hopper_tables, selfcheck

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_table() -> None:
    """If not: paste what `python -c "from flashjvp import support; print(support.markdown())"` prints."""
    assert support.markdown() in (ROOT / "README.md").read_text()


def test_the_readme_and_the_reference_name_the_cards() -> None:
    """If not: paste what `support.cards_in_words()` and `support.markdown_of_cards()` return."""
    assert support.cards_in_words() in (ROOT / "README.md").read_text()
    assert support.markdown_of_cards() in (ROOT / "docs" / "reference.md").read_text()


def test_releases_are_in_order() -> None:
    releases = [tuple(map(int, row.torch.split("."))) for row in support.TABLE]
    assert releases == sorted(set(releases))


def test_kernels_of_the_table_are_those_in_use() -> None:
    for row in support.TABLE:
        release = tuple(map(int, row.triton.split(".")[:2]))
        assert (row.gpu == support.PORTABLE) == (release not in hopper_tables.MEASURED), row


def test_the_pinned_torch_is_the_measured_one() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    (row,) = (row for row in support.TABLE if row.torch == pinned[1])
    assert (row.suite, row.gpu) == (support.WHOLE, support.MEASURED)


def test_continuous_integration_runs_releases_of_the_table() -> None:
    versions = re.search(r'^VERSIONS="(.*)"$', (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert versions is not None
    tried = {row.torch for row in support.TABLE}
    assert len(set(versions[1].split()) & tried) >= 2


@pytest.mark.parametrize("row", support.TABLE, ids=lambda row: row.torch)
def test_a_row_is_found_by_release_and_triton(row: support.Row) -> None:
    assert support.row_of(support.Versions(f"{row.torch}+cu130", row.triton, "3.11.7", "0.1.0")) is row
    assert support.row_of(support.Versions(row.torch, "3.5.0", "3.11.7", "0.1.0")) is None
    assert support.row_of(support.Versions(row.torch, None, "3.11.7", "0.1.0")) is None


def test_the_row_of_this_machine_is_marked() -> None:
    lines = support.text(support.TABLE[1]).splitlines()
    assert [line.startswith("> ") for line in lines] == [False, False, True, *(False,) * (len(lines) - 3)]
    assert max(map(len, lines)) <= 80
    assert not any(line.startswith(">") for line in support.text(None).splitlines())


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("triton", ["", "import sys; sys.modules['triton'] = None; "], ids=["as it is", "no triton"])
def test_the_command_prints_the_table(triton: str) -> None:
    program = f"{triton}import runpy; runpy.run_module('flashjvp', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(row.torch in done.stdout and row.triton in done.stdout for row in support.TABLE)
    assert f"Here: torch {torch.__version__}, {'no Triton' if triton else 'Triton'}" in done.stdout
    assert "\ncpu\n" in done.stdout and "float64" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_command_has_help() -> None:
    done = subprocess.run([sys.executable, "-m", "flashjvp", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "flashjvp.explain" in done.stdout


@pytest.mark.parametrize(
    ("capability", "verified", "expected"),
    [
        ((9, 0), True, "warp-specialised kernels for head dims padded to 64, 80, 96, 128"),
        ((9, 0), False, "portable kernels, since the warp-specialised kernels need Triton 3.6 or newer"),
        ((8, 0), True, "portable kernels, since warp-specialised kernels are written for sm_90"),
        ((12, 0), True, "portable kernels, since warp-specialised kernels are written for sm_90"),
        ((7, 5), True, "tiled: plain PyTorch, since triton expected compute capability"),
    ],
)
def test_gpus_are_described(
    capability: tuple[int, int], verified: bool, expected: str, monkeypatch: pytest.MonkeyPatch,
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(selfcheck, "_checked_card", lambda device, dtype: None)
    machine(
        capability=capability,
        device_name="a GPU",
        is_capturing=False,
        triton_cache=tmp_path,
        triton_release=(3, 6) if verified else (3, 5),
    )
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert f"cuda:0: a GPU, compute capability {capability[0]}.{capability[1]}" in printed
    half = " ".join(printed.split("float16", 1)[1].split("bfloat16", 1)[0].split())
    assert expected in half
    assert max(map(len, printed.splitlines())) <= 80
