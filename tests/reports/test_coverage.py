"""The heat map of a coverage sweep and the table of its worst calls, from invented rows."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from reports import build, coverage
from reports.schema import Row
from tests.reports.pages import cells, place
from tests.reports.test_schema import FAILED, make_row

SHAPE: dict[str, Any] = {
    "preset": "coverage", "batch": 2, "heads": 16, "kv_heads": 16, "queries": 4096, "keys": 4096, "causal": False,
    "mask": "none", "dtype": "bfloat16",
}  # fmt: skip


def pair(ours_ms: float, plain_ms: float, mode: str = "fwd", **changes: Any) -> list[Row]:
    """A call of flashjvp, and plain attention of its shape."""
    ours = SHAPE | {"provider": "flashjvp", "mode": mode, "latency_p50_ms": ours_ms} | changes
    whole = {"tangents": "qkv", "cotangents": "both"}
    plain = SHAPE | {"provider": "plain", "mode": f"plain-{mode}", "latency_p50_ms": plain_ms} | changes | whole
    return [make_row(**ours), make_row(**plain)]


def invented() -> list[Row]:
    rows = [row for d in range(8, 112, 8) for row in pair(3.0 + d / 100, 1.0, head_dim=d)]
    rows += pair(20.0, 2.0, mode="bwd", head_dim=64)
    rows += pair(9.0, 2.0, head_dim=64, tangents="q")[:1]
    rows += pair(4.0, 1.0, head_dim=64, batch=8) + pair(30.0, 10.0, head_dim=64, batch=1, queries=8192, keys=8192)
    rows += pair(50.0, 2.0, head_dim=64, value_dim=128) + pair(7.0, 1.0, head_dim=64, mask="bool")
    failed = pair(1.0, 1.0, head_dim=160)
    return [*rows, make_row(**vars(failed[0]) | FAILED | {"status": "oom", "reason": "too large"}), failed[1]]


def test_a_ratio_is_taken_against_plain_attention_of_the_same_shape() -> None:
    data = coverage.ratios(invented()).set_index(["group", "call", "mode"])["ratio"]
    assert data["head dims", "D=64", "bwd"] == 10.0
    assert data["head dims", "D=64", "fwd"] == pytest.approx(3.64)
    assert data["tangents of some inputs", "D=64, q", "fwd"] == 9.0  # plain attention of D = 64 took 1 ms
    assert data["other value dims", "D=64, Dv=128", "fwd"] == 25.0
    assert data["masks", "D=64, bool", "fwd"] == 7.0
    assert data["head dims", "D=160", "fwd"] != data["head dims", "D=160", "fwd"]


def test_the_worst_ten_come_with_what_gave_no_time_first() -> None:
    text = coverage.worst_table(invented())
    head, *lines = cells(text)
    assert len(lines) == 10 and head[-1] == "of plain"
    assert lines[0][-1] == "oom: too large"
    assert [line[1] for line in lines[1:5]] == ["D=64, Dv=128", "D=64", "D=64, q", "D=64, bool"]
    assert [float(line[-1]) for line in lines[1:]] == sorted((float(line[-1]) for line in lines[1:]), reverse=True)
    assert "20 calls; 4 take more than 6 times" in text and "1 gave no time" in text
    assert "In float16 and bfloat16 the farthest takes 25.00: other value dims, D=64, Dv=128, forward + JVP." in text
    assert "driver" in text and "python -m bench.sweep --preset coverage --providers flashjvp,plain" in text


def test_the_map_has_a_cell_for_each_call_and_says_its_ratio() -> None:
    figure = coverage.draw_coverage(invented())
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"D=64\n3.6", "D=64\n10.0", "D=160\nnone", "D=64\nDv=128\n25.0", "D=64\nbool\n7.0"} <= texts
    assert {"D=64\nN=4096\n4.0", "D=64\nN=8192\n3.0"} <= texts  # a batch of its own
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:5] == ["head dims", "tangents of some inputs", "lengths", "other value dims", "masks"]
    plt.close(figure)


def test_a_page_gets_the_table_and_a_sweep_its_figure(tmp_path: Path) -> None:
    readme, data = place(tmp_path, invented())
    build.build([readme], data)
    assert "oom: too large" in readme.read_text()
    assert (data / "machine" / "sweep.png").exists()
    assert not build.check([readme], data)


@pytest.mark.parametrize(
    ("colour", "text"), [((1, 1, 0.7, 1), "black"), ((0, 0.4, 0.2, 1), "white"), ((0.6, 0, 0.1, 1), "white")]
)
def test_text_stands_out_from_its_cell(colour: tuple[float, ...], text: str) -> None:
    assert coverage._legible_on(colour) == text
