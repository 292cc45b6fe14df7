"""What is printed fits the terminal: no digit of a table is cut, and a bar has its numbers, at 80 columns too."""

import io
import re

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from bench import interleaved, tune
from bench import table as sweep_table
from bench.trials import candidates
from flashjvp_commands.terminal import Bar, Fitted, console
from tests.reports.test_schema import make_row
from verify.codegen.command import Kernel
from verify.codegen.command import table as codegen_table
from verify.faults.command import Verdict as FaultVerdict
from verify.faults.command import table as faults_table

NUMBER = re.compile(r"\d[\d.e+-]*")
NARROW = 80


def printed(what: object, width: int) -> list[str]:
    out = Console(width=width, file=io.StringIO(), color_system=None)
    out.print(what)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


def numbers(lines: list[str]) -> set[str]:
    return {found for line in lines for found in NUMBER.findall(line)}


def assert_fits(what: Table, names: int, width: int = NARROW) -> None:
    """Lines have at most `width` columns, nothing is cut, and all numbers of columns at the right are there."""
    lines = printed(Fitted(what, names), width)
    assert max(map(len, lines)) <= width, lines
    assert not any("…" in line for line in lines)
    wanted = [str(cell) for column in what.columns if column.justify == "right" for cell in column.cells]
    assert {found for cell in wanted for found in NUMBER.findall(cell)} <= numbers(lines)


WORDS = st.sampled_from(
    ["a", "two words", "a-long/path/of_a_file.py", "backward_key_value, causal", "some more words here"]
)
NUMBERS = st.sampled_from(["1", "-1.234e-05", "12345678", "9.87e+100", "0.12"])


@settings(max_examples=60, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking takes minutes
@given(st.data(), st.integers(1, 3), st.integers(0, 14), st.integers(60, 120))
def test_no_digit_is_cut_in_any_table(data: st.DataObject, names: int, others: int, width: int) -> None:
    table = Table(title=data.draw(WORDS), show_lines=data.draw(st.booleans()))
    kinds = [False] * names + data.draw(st.lists(st.booleans(), min_size=others, max_size=others))
    for right in kinds:
        table.add_column(data.draw(WORDS), justify="right" if right else "left")
    for _ in range(data.draw(st.integers(1, 4))):
        table.add_row(*(data.draw(NUMBERS if right else WORDS) for right in kinds))
    assert_fits(table, names, width)


def test_a_table_that_fits_is_one() -> None:
    table = Table("name", "a", "b", title="title")
    table.add_row("x", "1", "2")
    assert sum("name" in line for line in printed(Fitted(table), NARROW)) == 1


def test_every_part_has_the_names_of_the_rows() -> None:
    table = Table("name")
    for i in range(12):
        table.add_column(f"column{i}", justify="right")
    table.add_row("row", *(f"{i}.123e-05" for i in range(12)))
    lines = printed(Fitted(table), NARROW)
    assert sum("name" in line for line in lines) == sum(" row " in line for line in lines) >= 2


def test_the_table_of_a_sweep_fits() -> None:
    rows = [
        make_row(provider=name, mode=mode, queries=n, keys=n)
        for name in ("math", "flashjvp")
        for mode in ("fwd", "fwd+bwd")
        for n in (64, 8192)
    ]
    lines = printed(sweep_table.table(rows), NARROW)
    assert max(map(len, lines)) <= NARROW and not any("…" in line for line in lines)
    errors = f"{rows[0].err_o:.1e}, {rows[0].err_o_t:.1e}, {rows[0].err_grad:.1e}"
    assert set(NUMBER.findall(errors)) <= numbers(lines)
    assert {f"{rows[0].latency_p50_ms:.3g}", "8192"} <= numbers(lines)


def test_the_tables_of_faults_compilers_and_tiles_fit() -> None:
    fault = FaultVerdict("a fault with a long name", "forward", "kernels/portable/backward_key_value.py", "float64",
                         "gqa-causal-long", "d_k_t", 1.2345e-3, 3.21e-7, True, "")  # fmt: skip
    assert_fits(faults_table([fault]), 1)
    kernel = Kernel("sm_90", "half", 128, 64, family="backward_key_value, causal", tile="128 x 64 x 8 x 2",
                    registers=255, spill_bytes=1048, loop_spills=77, shared_bytes=232448, tensor_core=512)  # fmt: skip
    assert_fits(codegen_table([kernel], "3.6.0"), 3)
    assert_fits(tune.summary([], candidates("sm_90", "half", ["forward"], [64]), {}), 1)
    assert_fits(interleaved.table([]), 3)


def test_a_bar_shows_step_total_rate_and_time_left() -> None:
    out = Console(width=NARROW, file=io.StringIO(), force_terminal=True, color_system=None)
    clock = iter(range(10_000))
    with Bar(out, "cases", 1200) as bar:
        bar.get_time = lambda: float(next(clock))  # type: ignore[method-assign]
        for _ in range(30):
            bar.advance_by(10, "transforms:vmap-of-vjp-of-a-long-name float32 is judged")
        lines = printed(bar.get_renderable(), NARROW)
    assert re.search(r"cases +300/1200 .* (\d+(\.\d+)?/s|\d+(\.\d+)? s each) +\d+:\d\d(:\d\d)? +left", lines[0]), lines
    assert "float32 is judged" in lines[1]
    assert max(map(len, lines)) <= NARROW


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("", 160)])
def test_a_console_is_as_wide_as_columns_says(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", columns)
    assert console().width == width
