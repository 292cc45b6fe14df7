"""Candidates of the tile search, the log of what became of them, and which of them wins."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.tile_table import current
from bench.trials import COLUMNS, Candidate, Trial, candidates, read_trials, winners, write_trials
from flashjvp.kernels.launch.hopper_tables import PIPELINES
from flashjvp.kernels.launch.schedule import Tile
from reports.schema import DamagedError, VersionError


def make_trial(tile: Sequence[int], ms: float | None, head_dim: int = 64, **changes: Any) -> Trial:
    kind, family = changes.pop("kind", "half"), changes.pop("family", "forward")
    candidate = Candidate("sm_90", kind, family, head_dim, tuple(tile))
    values: dict[str, Any] = {
        "candidate": candidate, "status": "compiled" if ms is None else "ok", "registers": 240, "spill_bytes": 0,
        "loop_spill_share": 0.0, "shared_bytes": 1024, "latency_p50_ms": ms, "machine": "a", "driver": "b",
        "torch_version": "c", "triton_version": "d", "commit": "e", "date_utc": "2025-01-01T00:00:00Z",
    }  # fmt: skip
    return Trial(**(values | changes))


def test_candidates_come_in_one_order_with_the_tile_in_use_first() -> None:
    found = candidates("sm_90", "half", ["forward", "backward_preprocess", "backward_key_value"], [64, 72, 128])
    assert found == candidates("sm_90", "half", ["forward", "backward_preprocess", "backward_key_value"], [64, 72, 128])
    assert len(set(found)) == len(found)
    first = found[:7]
    assert [(x.family, x.head_dim) for x in first] == [
        *(("forward", d) for d in (64, 72, 128)),
        *(("backward_preprocess", d) for d in (64, 72, 128)),
        ("backward_key_value", 64),  # which a wider head dim does not have
    ]
    assert all(x.tile == current(x.entry) for x in first)
    assert {x.entry[3] for x in found if x.head_dim == 72} == {128}
    assert all((x.tile[1], x.tile[3]) == (0, 1) for x in found if x.family == "backward_preprocess")


def test_tiles_of_the_warp_specialised_kernels_are_candidates_too() -> None:
    of_keys = ["backward_key", "backward_dq_accum", "backward_value", "backward_pairs", "backward_one_pass"]
    families = ["forward", *of_keys, "backward_query"]
    found = candidates("sm_90", "tangents", families, [64, 72, 128, 256])
    first = {(x.family, x.entry[3]): x.tile for x in reversed(found)}
    assert first == {
        (family, width): tuple(tiles["tangents"][family])
        for width, tiles in PIPELINES["sm_90"].items()
        if width not in (96, 160, 192)
        for family in tiles["tangents"]
    }
    near = [x.tile for x in found if (x.family, x.head_dim) == ("backward_query", 128)][:7]
    # in use; then one step away: half or twice the rows, a stage, a register operand
    assert near[0] == (32, 3, 0, 1, 0)
    assert set(near[1:5]) == {(64, 3, 0, 1, 0), (32, 2, 0, 1, 0), (32, 4, 0, 1, 0), (32, 3, 1, 1, 0)}
    assert {x.tile[2:] for x in found if x.family in ("backward_value", "backward_pairs")} == {(0, 1, 0)}
    assert {x.tile[4] for x in found if x.family == "backward_dq_accum"} == {1, 2}
    assert {x.family for x in candidates("sm_90", "plain", families, [128])} == {
        "forward", "backward_key", "backward_query"
    }  # fmt: skip
    assert not candidates("sm_80", "plain", families, [128])


def test_the_log_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.csv"
    trials = [
        make_trial((64, 64, 4, 3), 0.1 + 0.2, latency_p20_ms=1 / 3, repeats=30),
        make_trial((32, 64, 4, 3), None, status="skipped", reason='spills: "12", %', registers=None),
    ]
    write_trials(path, trials)
    assert read_trials(path) == trials
    assert path.read_text().split("\n")[0] == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("change", "line", "kind"),
    [
        (lambda text: text.replace("head_dim", "width"), 1, DamagedError),
        (lambda text: text.replace("compiled", "splendid"), 3, DamagedError),
        (lambda text: text[: text.rindex(",")], 3, DamagedError),
        (lambda text: text.replace("64x64x4x3", "64x64xx3"), 2, DamagedError),
        (lambda text: text.replace("\n2,", "\n9,", 1), 2, VersionError),
        (lambda text: text.replace("half,forward,64", "half,forward,wide", 1), 2, DamagedError),
    ],
)
def test_a_damaged_log_names_its_line(tmp_path: Path, change: Any, line: int, kind: type[Exception]) -> None:
    path = tmp_path / "log.csv"
    write_trials(path, [make_trial((64, 64, 4, 3), 1.0), make_trial((32, 64, 4, 3), None)])
    path.write_text(change(path.read_text()))
    with pytest.raises(kind, match=f"line {line}: "):
        read_trials(path)


def test_a_tile_gives_way_only_to_one_that_is_clearly_faster() -> None:
    entry = ("sm_90", "half", "forward", 64)
    now = current(entry)
    other = Tile(*now)._replace(stages=now[3] + 1)
    assert winners([make_trial(now, 1.0), make_trial(other, 0.99)]) == {entry: now}
    assert winners([make_trial(now, 1.0), make_trial(other, 0.9)]) == {entry: other}
    assert winners([make_trial(now, None, status="skipped"), make_trial(other, 5.0)]) == {entry: other}
    assert winners([make_trial(now, None), make_trial(other, None)]) == {}


def test_head_dims_that_share_an_entry_are_judged_together() -> None:
    entry = ("sm_90", "half", "forward", 128)
    now, fast, narrow = current(entry), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    both = [make_trial(now, 1.0, d) for d in (72, 128)] + [make_trial(fast, 0.5, 72), make_trial(fast, 1.2, 128)]
    assert winners(both) == {entry: fast}
    assert winners([*both, make_trial(narrow, 0.1, 72)]) == {entry: fast}
    slower = [
        replace(x, latency_p50_ms=4.0) if (x.candidate.tile, x.candidate.head_dim) == (fast, 128) else x for x in both
    ]
    assert winners(slower) == {entry: now}
    assert winners([make_trial(fast, 0.5, 72), make_trial(fast, None, 128)]) == {}
