"""Results over their error budget in tables and figures, and points of one length, which hide none of each other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import pytest

from reports.panels import LATENCY, MEMORY
from reports.plot import draw_lines, draw_speedup, draw_sweep
from reports.style import LOOKS
from reports.tables import sweep_table
from tests.reports.pages import cells, rows_of
from tests.reports.test_plot import COSTS, LENGTHS, lines_of, texts
from tests.reports.test_plot import rows_of as plotted
from tests.reports.test_schema import FAILED, make_row


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_a_result_over_budget_has_its_time_and_its_error_but_no_ratio() -> None:
    rows = rows_of((256,))
    reason = "d_k 3.9e-03 (budget 3.0e-03), worst row 5.2e-03 (budget 4.0e-03); o 1.0e-3 (budget 2.0e-3)"
    shape: Any = {"heads": 4, "kv_heads": 4, "causal": False, "queries": 256, "keys": 256, "status": "wrong"}
    rows.append(make_row(provider="official", mode="fwd", reason=reason, latency_p50_ms=51.2, **shape))
    rows.append(make_row(provider="rcm", mode="fwd", reason="o nan (budget 1e-3)", latency_p50_ms=4.0, **shape))
    rows.append(make_row(provider="rcm", mode="fwd+bwd", reason="no shape", **shape | FAILED))
    table = sweep_table(rows, rows)
    assert [line[-2:] for line in cells(table)[1:]] == [
        ["51.2 ms, error 1.3 of budget", "4.00 ms, error inf of budget"],
        ["", "wrong"],
    ]
    assert f"- official (TVM), forward + JVP: over budget, {reason}" in table
    assert "the largest error over what it may be" in table


def test_results_over_budget_are_dashed_and_say_so() -> None:
    rows = [
        replace(row, status="wrong", reason="o 3e-3 (budget 2e-3)") if row.provider == "official" else row
        for row in plotted(LENGTHS)
    ]
    figure = draw_lines(rows, LATENCY)
    found = lines_of(figure.axes[0])
    line = found["official (TVM), over budget"]
    assert list(line.get_ydata()) == [0.5 * n for n in sorted(LENGTHS)]
    assert line.get_color() == LOOKS["official"].colour
    assert line.get_linestyle() == "--" and line.get_markerfacecolor() == "white"
    assert "official (TVM)" not in found and not texts(figure)
    assert "official (TVM), over budget" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not [text for text in figure.legends[0].get_texts() if text.get_text() not in found]
    figure = draw_sweep([row for row in rows if row.queries == 64])
    assert [text.get_text() for text in figure.axes[0].texts] == ["16.0", "64.0", "32.0, over budget"]
    assert "official (TVM)" not in [text.get_text() for text in draw_speedup(rows).legends[0].get_texts()]


def test_points_of_one_length_stand_side_by_side() -> None:
    figure = draw_lines(plotted(LENGTHS), MEMORY)
    figure.canvas.draw()
    lines = [line for name, line in lines_of(figure.axes[0]).items() if name != "least possible"]
    places = [line.get_transform().transform((64, 1))[0] for line in lines]
    assert len({round(place, 2) for place in places}) == len(COSTS)
    exact = figure.axes[0].transData.transform((64, 1))[0]
    assert all(abs(place - exact) < 5 / 72 * figure.dpi for place in places)
