from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from reports.plot import COLOURS, draw_sweep, plot_sweep
from reports.schema import Row
from tests.reports.test_schema import FAILED, make_row


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def rows_of(lengths: tuple[int, ...], **changes: Any) -> list[Row]:
    return [
        make_row(
            provider=provider,
            mode=mode,
            queries=length,
            keys=length,
            latency_p50_ms=length * cost,
            peak_mib=length * cost / 2,
            **changes,
        )
        for length in lengths
        for provider, cost in (("flashjvp", 0.25), ("math", 1.0))
        for mode in ("fwd", "fwd+bwd")
    ]


def texts(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


def test_one_length_gives_a_labelled_bar_a_row() -> None:
    figure = draw_sweep(rows_of((64,)))
    latency, memory = figure.axes
    assert [bar.get_height() for bar in latency.patches] == [16, 16, 64, 64]
    assert [bar.get_height() for bar in memory.patches] == [8, 8, 32, 32]
    assert texts(figure, 0) == ["16", "16", "64", "64"]
    assert [label.get_text() for label in latency.get_xticklabels()] == ["forward + JVP", "forward + JVP + backward"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flashjvp", "math"]


def test_several_lengths_give_a_log_log_line_a_provider_and_mode() -> None:
    rows = rows_of((256, 64, 128))
    figure = draw_sweep(rows)
    for panel, column in zip(figure.axes, ("latency_p50_ms", "peak_mib"), strict=True):
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert len(panel.lines) == 4
        for line in panel.lines:
            provider = line.get_label().split(",")[0]
            assert list(line.get_xdata()) == [64, 128, 256]
            expected = [getattr(row, column) for row in rows if row.provider == provider and row.mode == "fwd"]
            assert list(line.get_ydata()) == sorted(expected)
        assert {line.get_color() for line in panel.lines} == set(COLOURS[:2])


@pytest.mark.parametrize("lengths", [(64,), (64, 128)])
def test_failures_are_marked_by_their_status(lengths: tuple[int, ...]) -> None:
    rows = rows_of(lengths)
    rows[3] = make_row(provider="math", queries=64, keys=64, status="oom", reason="too large", **FAILED)
    figure = draw_sweep(rows)
    for panel in (0, 1):
        assert sum("oom" in text for text in texts(figure, panel)) == 1


@pytest.mark.parametrize("lengths", [(64,), (64, 128)])
def test_a_sweep_without_one_result_is_drawn_too(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    rows = [make_row(queries=n, keys=n, status="crashed", reason="killed by SIGSEGV", **FAILED) for n in lengths]
    assert plot_sweep(rows, tmp_path / "sweep.png").stat().st_size > 0


def test_the_title_says_what_is_the_same_in_every_row() -> None:
    title = draw_sweep(rows_of((64, 128), causal=True)).get_suptitle()
    assert title == "NVIDIA H200, bfloat16   (B=1, H=4, Hkv=2, D=64, causal)"
    title = draw_sweep(rows_of((64,), causal=False, kv_heads=4)).get_suptitle()
    assert title == "NVIDIA H200, bfloat16   (B=1, H=4, N=64, D=64)"


def test_the_file_is_an_image_wide_enough_to_print(tmp_path: Path) -> None:
    path = plot_sweep(rows_of((64, 128)), tmp_path / "new" / "sweep.png")
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width >= 1400
    assert height >= 600
