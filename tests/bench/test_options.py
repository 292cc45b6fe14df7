from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases import Case
from bench.options import make_cells, parser
from bench.providers import PROVIDERS


@pytest.mark.parametrize(
    ("device", "heads", "head_dim", "dtype", "modes"),
    [("cpu", 1, 64, "float32", ("fwd", "fwd+bwd")), ("cuda", 24, 128, "bfloat16", ("fwd", "bwd", "fwd+bwd"))],
)
def test_defaults_fit_the_device(device: str, heads: int, head_dim: int, dtype: str, modes: tuple[str, ...]) -> None:
    cells = make_cells(parser().parse_args([]), device)
    assert [(cell.provider, cell.case.mode) for cell in cells] == [
        (provider, mode) for provider in ("flashjvp", "math") for mode in modes
    ]
    expected = {"batch": 1, "heads": heads, "kv_heads": heads, "queries": 8192, "keys": 8192, "head_dim": head_dim}
    assert cells[0].case == Case(mode="fwd", dtype=dtype, causal=False, **expected)


def test_lists_are_measured_in_every_combination() -> None:
    lists = ["--seq", "64,128", "--heads", "4,8", "--kv-heads", "2,4", "--head-dim", "32,72", "--batch", "1,3"]
    lists += ["--dtype", "float32,float64", "--mask", "none,bool", "--modes", "fwd,bwd", "--causal"]
    cells = make_cells(parser().parse_args(lists), "cpu")
    assert len(cells) == len(set(cells)) == 2 * 2**8
    assert {cell.case.kv_heads for cell in cells} == {2, 4}
    assert all(cell.case.causal and cell.case.queries == cell.case.keys for cell in cells)


def test_partial_modes_are_named_as_such_and_measured_once() -> None:
    arguments = ["--providers", "plain,finite-difference,flashjvp", "--modes", "fwd,bwd,plain-fwd"]
    cells = make_cells(parser().parse_args(arguments), "cuda")
    assert [(cell.provider, cell.case.mode) for cell in cells] == [
        *[("plain", mode) for mode in ("plain-fwd", "plain-bwd")],
        *[("finite-difference", mode) for mode in ("approx-fwd", "bwd", "plain-fwd")],
        *[("flashjvp", mode) for mode in ("fwd", "bwd", "plain-fwd")],
    ]
    reasons = [PROVIDERS[cell.provider].why_not(cell.case, "cuda") for cell in cells]
    assert [bool(reason) for reason in reasons] == [False, False, False, True, True, False, False, False]


def test_the_paper_preset_is_the_published_table() -> None:
    cells = make_cells(parser().parse_args(["--preset", "paper", "--providers", "flashjvp"]), "cuda")
    shapes = {(cell.case.heads, cell.case.queries) for cell in cells}
    assert shapes == {(heads, 2**power) for heads in (1, 24) for power in range(7, 16)}
    assert {(c.case.batch, c.case.head_dim, c.case.dtype, c.preset) for c in cells} == {(1, 128, "bfloat16", "paper")}


def test_the_dit_preset_has_the_shapes_of_the_model() -> None:
    cells = make_cells(parser().parse_args(["--preset", "dit", "--providers", "flashjvp"]), "cuda")
    shapes = {(c.case.batch, c.case.heads, c.case.queries, c.case.head_dim) for c in cells}
    expected = {(1, 24, 8192, 128), (1, 24, 8192, 64), (32, 18, 1024, 64), (64, 18, 256, 64), (1, 24, 1024, 128)}
    assert expected | {(8, 16, 4096, 72), (8, 16, 4096, 64), (2, 18, 16384, 64), (2, 16, 16384, 72)} <= shapes
    plain = replace(next(c.case for c in cells if c.case.queries == 8192 and c.case.head_dim == 128), mode="fwd")
    cases = {cell.case for cell in cells}
    assert {replace(plain, causal=True), replace(plain, mask="bool"), replace(plain, kv_heads=8)} <= cases
    assert {replace(plain, mode="plain-fwd"), replace(plain, mode="plain-bwd")} <= cases


def test_sizes_choose_among_the_shapes_of_a_preset() -> None:
    arguments = ["--preset", "dit", "--head-dim", "72", "--seq", "256,1024", "--providers", "math"]
    cells = make_cells(parser().parse_args(arguments), "cuda")
    assert {(cell.case.queries, cell.case.heads) for cell in cells} == {(256, 16), (1024, 16)}
    with pytest.raises(ValueError, match="preset dit has no shape"):
        make_cells(parser().parse_args(["--preset", "dit", "--seq", "77"]), "cuda")


def test_peers_with_a_path_are_measured_unless_others_are_named(tmp_path: Path) -> None:
    peer = ["--peer", f"rcm={tmp_path}"]
    assert {cell.provider for cell in make_cells(parser().parse_args(peer), "cuda")} == {"flashjvp", "math", "rcm"}
    named = make_cells(parser().parse_args([*peer, "--providers", "math"]), "cuda")
    assert {cell.provider for cell in named} == {"math"}
