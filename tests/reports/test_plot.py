from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.panels import LATENCY, MEMORY, THROUGHPUT
from reports.plot import draw_lines, draw_speedup, draw_sweep, has_speedup, plot_sweep
from reports.schema import Row
from reports.style import LOOKS, look, number, order, times
from tests.reports.test_schema import FAILED, make_row

LENGTHS = (256, 64, 128)
COSTS = {"flashjvp": 0.25, "math": 1.0, "official": 0.5}
pytestmark = pytest.mark.filterwarnings("error")  # such as of a layout that does not fit


def rows_of(lengths: tuple[int, ...], **changes: Any) -> list[Row]:
    values = {"heads": 4, "kv_heads": 4, "causal": False} | changes
    return [
        make_row(
            provider=provider, mode=mode, queries=length, keys=length, latency_p50_ms=length * cost,
            peak_mib=length * cost / 2, tflops=length / cost, **values,
        )
        for length in lengths
        for provider, cost in COSTS.items()
        for mode in ("fwd", "fwd+bwd")
    ]  # fmt: skip


def failed(**changes: Any) -> Row:
    return make_row(
        **({"status": "oom", "reason": "too large", "heads": 4, "kv_heads": 4, "causal": False} | FAILED | changes)
    )


def lines_of(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_one_length_gives_a_labelled_bar_a_row() -> None:
    figure = draw_sweep(rows_of((64,)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["forward + JVP", "forward + JVP + backward"] * 2
    assert [axes.get_xlabel() for axes in figure.axes] == [LATENCY[1]] * 2 + [MEMORY[1]] * 2
    for axes in figure.axes[:2]:
        assert [bar.get_width() for bar in axes.patches] == [16, 64, 32]
        assert [text.get_text() for text in axes.texts] == ["16.0", "64.0", "32.0"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["flashjvp", "PyTorch math", "official (TVM)"]
    assert [bar.get_width() for bar in figure.axes[2].patches] == [8, 32, 16]


def test_a_provider_keeps_its_place_where_it_has_no_row() -> None:
    rows = [row for row in rows_of((64,)) if (row.provider, row.mode) != ("math", "fwd")]
    figure = draw_sweep(rows)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["flashjvp", "PyTorch math", "official (TVM)"]
    assert [len(axes.patches) for axes in figure.axes] == [3] * 4
    assert [bar.get_width() for bar in figure.axes[0].patches] == [16, 0, 32]
    assert [text.get_text() for text in figure.axes[0].texts] == ["16.0", "", "32.0"]


@pytest.mark.parametrize("what", [LATENCY, MEMORY, THROUGHPUT], ids=lambda what: what[0])
def test_lines_have_a_panel_a_mode_and_head_count(what: tuple[str, str]) -> None:
    rows = rows_of(LENGTHS) + rows_of(LENGTHS, heads=8, kv_heads=8)
    figure = draw_lines(rows, what)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{mode}, H={heads}" for mode in ("forward + JVP", "forward + JVP + backward") for heads in (4, 8)
    ]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert axes.get_yscale() == ("linear" if what == THROUGHPUT else "log")
        found = lines_of(axes)
        for provider in COSTS:
            line = found[LOOKS[provider].label]
            expected = {row.queries: getattr(row, what[0]) for row in rows if row.provider == provider}
            assert list(line.get_xdata()) == sorted(LENGTHS)
            assert list(line.get_ydata()) == [expected[length] for length in sorted(LENGTHS)]
            assert line.get_color() == LOOKS[provider].colour
        if what == THROUGHPUT:
            assert set(found["matrix product"].get_ydata()) == {rows[0].ceiling_tflops}
            assert axes.get_ylim()[1] > rows[0].ceiling_tflops
        if what == MEMORY:
            assert set(found["least possible"].get_ydata()) == {rows[0].least_mib - rows[0].inputs_mib}
    assert figure.axes[0].get_ylabel() == what[1]


def test_a_sweep_of_many_shapes_shows_the_fullest_mode() -> None:
    rows = [row for heads in (4, 8) for row in rows_of(LENGTHS, heads=heads, kv_heads=heads)]
    figure = draw_sweep(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"forward + JVP + backward, H={heads}" for heads in (4, 8)
    ] * 2
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == [LATENCY[1], MEMORY[1]]


def test_failures_stand_above_the_lines() -> None:
    rows = rows_of((64, 128, 256))
    rows = [row for row in rows if not (row.provider == "math" and row.queries == 256)]
    rows += [failed(provider="math", mode=mode, queries=256, keys=256) for mode in ("fwd", "fwd+bwd")]
    rows += [
        failed(provider="rcm", mode="fwd+bwd", queries=n, keys=n, status="unsupported", reason="no gradient")
        for n in (64, 128, 256)
    ]
    figure = draw_lines(rows, LATENCY)
    forward, both = figure.axes
    assert [text.get_text() for text in forward.texts] == ["oom"]
    assert [text.get_text() for text in both.texts] == ["oom", "unsupported: rCM"]
    (crosses,) = [line for line in forward.lines if line.get_label() == "_failed"]
    assert list(crosses.get_xdata()) == [256]
    assert crosses.get_color() == LOOKS["math"].colour
    figure.canvas.draw()
    panel, title = forward.get_window_extent(), forward._left_title.get_window_extent()
    assert panel.y1 < crosses.get_window_extent().y0 < crosses.get_window_extent().y1 < title.y0
    assert forward.get_ylim()[1] < 2 * 256  # they stretch no axis
    assert "rCM" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_any_number_of_failures_leaves_room_for_the_panels() -> None:
    rows = [row for heads in (4, 8) for row in rows_of(LENGTHS, heads=heads, kv_heads=heads)]
    names = [f"a provider with a long name {i}" for i in range(4)]
    rows += [
        failed(provider=name, mode="fwd", queries=n, keys=n, heads=heads, kv_heads=heads)
        for name in names
        for n in LENGTHS
        for heads in (4, 8)
    ]
    figure = draw_lines(rows, LATENCY)
    figure.canvas.draw()
    left, right = figure.axes[:2]
    assert " ".join(text.get_text() for text in left.texts) == f"oom: {', '.join(names)}"
    assert len(left.texts) > 1
    places = [axes.get_window_extent() for axes in (left, right)]
    assert all(2.5 * place.width > figure.bbox.width for place in places)
    for axes, place in zip((left, right), places, strict=True):
        for text in axes.texts:
            assert place.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 < place.x1


def test_a_peer_without_attention_without_a_jvp_is_not_named_for_it() -> None:
    missing: dict[str, Any] = {"status": "unsupported", "reason": "no such mode"}
    rows = rows_of(LENGTHS) + [failed(provider="math", mode="plain-fwd", queries=n, keys=n, **missing) for n in LENGTHS]
    rows += [failed(provider="rcm", mode="fwd", queries=n, keys=n, **missing) for n in LENGTHS]
    figure = draw_lines(rows, LATENCY)
    assert texts(figure) == ["unsupported: rCM"]
    assert "PyTorch math without JVP" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_series_that_was_asked_for_at_one_length_makes_no_line_and_is_left_out() -> None:
    shape: Any = {"heads": 4, "kv_heads": 4, "causal": False}
    one = make_row(provider="flashjvp", mode="plain-fwd", queries=LENGTHS[0], keys=LENGTHS[0], **shape)
    figure = draw_lines([*rows_of(LENGTHS), one], LATENCY)
    assert "flashjvp without JVP" not in [text.get_text() for text in figure.legends[0].get_texts()]
    others = [failed(provider="flashjvp", mode="plain-fwd", queries=n, keys=n, status="oom") for n in LENGTHS[1:]]
    figure = draw_lines([*rows_of(LENGTHS), one, *others], LATENCY)
    assert lines_of(figure.axes[0])["flashjvp without JVP"].get_marker() not in ("", "None")


def test_a_sweep_of_one_length_has_no_figure_of_speed_ups() -> None:
    assert has_speedup(rows_of(LENGTHS)) and not has_speedup(rows_of(LENGTHS[:1]))


def test_partial_modes_are_drawn_beside_the_whole_ones() -> None:
    rows = rows_of(LENGTHS)
    for length in LENGTHS:
        shape: Any = {"heads": 4, "kv_heads": 4, "causal": False, "queries": length, "keys": length}
        rows.append(make_row(provider="plain", mode="plain-fwd", latency_p50_ms=0.1, **shape))
        rows.append(make_row(provider="flashjvp", mode="plain-fwd", latency_p50_ms=0.2, **shape))
        rows.append(make_row(provider="finite-difference", mode="approx-fwd", latency_p50_ms=length * 0.75, **shape))
    figure = draw_lines(rows, LATENCY)
    assert len(figure.axes) == 2
    found = lines_of(figure.axes[0])
    assert set(found["SDPA without JVP"].get_ydata()) == {0.1}
    assert set(found["flashjvp without JVP"].get_ydata()) == {0.2}
    assert list(found["flashjvp"].get_ydata()) == [16, 32, 64]
    ratios = [text for text in texts(draw_speedup(rows)) if text == times(3)]
    assert len(ratios) == len(LENGTHS)  # of the finite difference; attention without a JVP is no peer


def test_the_speed_up_is_the_ratio_within_a_shape_and_mode() -> None:
    rows = rows_of(LENGTHS) + [row for row in rows_of(LENGTHS, heads=8, kv_heads=8) if row.provider != "official"]
    figure = draw_speedup(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["forward + JVP, H=4", "forward + JVP, H=8"]
    for axes, ratios in zip(figure.axes[:2], ([4] * 3 + [2] * 3, [4] * 3), strict=True):
        assert [bar.get_y() + bar.get_height() for bar in axes.patches] == ratios
        assert [text.get_text() for text in axes.texts] == [times(ratio) for ratio in ratios]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128", "256"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PyTorch math", "official (TVM)"]


def test_a_peer_that_failed_is_named_in_place_of_its_bar() -> None:
    rows = [
        row for row in rows_of(LENGTHS) if row.provider == "flashjvp" or (row.provider == "math" and row.queries == 64)
    ]
    rows += [failed(provider="math", mode="fwd", queries=n, keys=n) for n in (128, 256)]
    axes = draw_speedup(rows).axes[0]
    assert [text.get_text() for text in axes.texts] == [times(4), "oom", "oom"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128", "256"]
    assert axes.get_xlim() == (-0.5, 2.5)
    assert len(axes.patches) == 1


def test_without_a_peer_there_is_no_speed_up() -> None:
    ours = [row for row in rows_of(LENGTHS) if row.provider == "flashjvp"]
    peers = [row for row in rows_of(LENGTHS, heads=8, kv_heads=8) if row.provider == "math"]
    for rows in (ours, peers, ours + peers):
        assert not has_speedup(rows)
        with pytest.raises(ValueError, match="no peer"):
            draw_speedup(rows)


def test_shapes_of_few_lengths_are_left_to_the_table() -> None:
    figure = draw_lines(rows_of(LENGTHS) + rows_of((512,), causal=True), LATENCY)
    assert {axes.get_title(loc="left") for axes in figure.axes} == {"forward + JVP", "forward + JVP + backward"}


def test_two_batch_sizes_of_one_length_are_two_shapes() -> None:
    figure = draw_lines(rows_of(LENGTHS) + rows_of(LENGTHS, batch=2), LATENCY)
    assert figure.axes[1].get_title(loc="left") == "forward + JVP, B=2"
    varying = [row for i, n in enumerate(LENGTHS) for row in rows_of((n,), batch=2**i)]
    figure = draw_lines(varying, LATENCY)
    assert len(figure.axes) == 2
    assert "B=4 to 1" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("draw", [draw_sweep, lambda rows: draw_lines(rows, LATENCY), draw_speedup, has_speedup])
def test_rows_of_several_runs_are_not_compared(draw: Any) -> None:
    rows = [*rows_of(LENGTHS), *rows_of(LENGTHS, run="2025-01-02T00:00:00Z")]
    with pytest.raises(ValueError, match="2025-01-02"):
        draw(rows)
    with pytest.raises(ValueError, match="at least one row"):
        draw([])


@pytest.mark.parametrize("lengths", [(64,), (64, 128)])
def test_a_sweep_without_one_result_is_drawn_too(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    rows = [failed(queries=n, keys=n, status="crashed", reason="killed by SIGSEGV") for n in lengths]
    path = plot_sweep(rows, tmp_path / "sweep.png")
    assert path.stat().st_size > 0
    assert any("crashed" in text for text in texts(draw_sweep(rows)))


def test_the_title_says_what_is_the_same_in_every_row() -> None:
    title = draw_sweep(rows_of((64, 128), causal=True, kv_heads=2)).get_suptitle()
    assert title == "NVIDIA H200   (B=1, H=4, Hkv=2, D=64, bfloat16, causal)"
    assert draw_sweep(rows_of((64,))).get_suptitle() == "NVIDIA H200   (B=1, H=4, D=64, bfloat16, N=64)"


@pytest.mark.parametrize("lengths", [(64,), (64, 128, 256)])
def test_the_file_is_an_image_wide_enough_to_print(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    path = plot_sweep(rows_of(lengths), tmp_path / "new" / "sweep.png")
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width >= 1400
    assert height >= 400
    assert list(path.parent.iterdir()) == [path]


def test_providers_have_colours_and_an_order_of_their_own() -> None:
    looks = [x for name, x in LOOKS.items() if not name.startswith("flashjvp-")]
    assert len({x.colour for x in looks}) == len(looks)
    assert order(["new", "math", "flashjvp", "math"]) == ["flashjvp", "math", "new"]
    assert look("new").label == "new"


@pytest.mark.parametrize(
    ("value", "text"), [(4.856, "4.86"), (27.0, "27.0"), (99.97, "100"), (31489.5, "31490"), (0.0312, "0.0312")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
