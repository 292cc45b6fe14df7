from dataclasses import replace
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from reports.verification import Verdict
from reports.verify_plot import SWEEPS, draw_sweep, plot_sweeps
from tests.reports.test_verification import make_verdict

pytestmark = pytest.mark.filterwarnings("error")  # such as of a layout that does not fit
LENGTHS = (256, 64, 128)


def rows_of(group: str = SWEEPS[0].group) -> list[Verdict]:
    return [
        make_verdict(
            group=group, backend=backend, dtype=dtype, quantity=quantity, keys=n, queries=n,
            error=n * cost * unit, dense_error=n * unit, budget=2 * n * unit,
        )
        for dtype, unit in (("float32", 1e-7), ("bfloat16", 1e-3))
        for backend, cost in (("reference", 1.0), ("tiled", 1.5))
        for quantity in ("o", "o_t", "d_q", "d_k")
        for n in LENGTHS
    ]  # fmt: skip


def test_a_panel_a_type_and_tensor_with_backends_dense_attention_and_budget() -> None:
    figure = draw_sweep(rows_of(), SWEEPS[0])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["bfloat16", "float32"]
    assert len(figure.axes) == 6
    for axes in figure.axes:
        lines = {str(line.get_label()): line for line in axes.lines}
        unit = 1e-3 if figure.axes.index(axes) % 2 == 0 else 1e-7
        assert list(lines["tiled"].get_xdata()) == sorted(LENGTHS)
        assert list(lines["tiled"].get_ydata()) == pytest.approx([1.5 * n * unit for n in sorted(LENGTHS)])
        assert list(lines["dense attention in the same type"].get_ydata()) == pytest.approx(
            [n * unit for n in sorted(LENGTHS)]
        )
        low, high = axes.get_ylim()
        assert low < 64 * unit < 2 * 256 * unit < high
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["tiled", "reference", "dense attention in the same type", "budget"]
    plt.close(figure)


def test_the_worst_gradient_is_drawn() -> None:
    rows = [*rows_of(), make_verdict(group=SWEEPS[0].group, quantity="d_k_t", dtype="float32", keys=64, error=0.5)]
    figure = draw_sweep(rows, SWEEPS[0])
    (line,) = [line for line in figure.axes[5].lines if line.get_label() == "tiled"]
    assert line.get_ydata()[0] == 0.5
    plt.close(figure)


def test_a_file_for_each_sweep_that_has_rows(tmp_path: Path) -> None:
    rows = [*rows_of(), make_verdict(group="masks"), make_verdict(group=SWEEPS[1].group, error=None, ok=False)]
    (path,) = plot_sweeps(rows, tmp_path / "new" / "verify")
    assert path.name == "verify-length.png"
    height, width = matplotlib.image.imread(path).shape[:2]
    assert (width >= 900) and (height >= 900)


def test_errors_of_zero_leave_a_gap(tmp_path: Path) -> None:
    rows = [replace(row, error=0.0, dense_error=0.0, budget=0.0 if row.quantity == "o" else 1.0) for row in rows_of()]
    assert len(plot_sweeps(rows, tmp_path / "verify")) == 1
