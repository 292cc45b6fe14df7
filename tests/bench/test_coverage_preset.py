"""The coverage preset: what it covers, that plain attention stands beside every call, and calls in part are judged."""

from dataclasses import replace

import pytest
import torch

from bench import gate, precompile
from bench.cases import Case, make_inputs
from bench.options import make_cells, parser
from bench.presets import COVERED_DIMS
from bench.providers import PROVIDERS
from reports.coverage import SHAPE

SMALL = Case(
    mode="fwd+bwd", batch=1, heads=2, kv_heads=1, queries=20, keys=24, head_dim=8, dtype="float32", causal=False
)


def test_it_covers_every_head_dim_length_and_subset() -> None:
    cells = make_cells(parser().parse_args(["--preset", "coverage"]), "cuda")
    cases = [cell.case for cell in cells if cell.provider == "flashjvp"]
    assert {case.head_dim for case in cases} == {*range(8, 257, 8), 1, 36, 100, 130, 255}
    assert {case.queries for case in cases} == {2**power for power in range(4, 18)}
    assert {case.tangents for case in cases} == {"q", "k", "v", "qk", "qv", "kv", "qkv"}
    assert {case.cotangents for case in cases} == {"both", "o", "o_t"}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.mask for case in cases} == {"none", "bool", "additive"} and any(case.causal for case in cases)
    assert any(case.width > case.head_dim for case in cases) and any(case.width < case.head_dim for case in cases)
    assert {case.heads // case.kv_heads for case in cases} == {1, 4, 16}


def test_plain_attention_of_its_shape_stands_beside_every_call_once() -> None:
    cells = make_cells(parser().parse_args(["--preset", "coverage"]), "cuda")

    def shape(case: Case) -> tuple[object, ...]:
        return tuple(getattr(case, name) for name in SHAPE)

    plain = [(shape(cell.case), cell.case.mode) for cell in cells if cell.provider == "plain"]
    assert len(plain) == len(set(plain))
    ours = {(shape(cell.case), f"plain-{cell.case.mode}") for cell in cells if cell.provider == "flashjvp"}
    assert ours == set(plain)


def test_what_ends_early_has_every_head_dim_and_the_longest_calls_come_last() -> None:
    cells = make_cells(parser().parse_args(["--preset", "coverage"]), "cuda")
    first = {cell.case.head_dim for cell in cells[: 4 * len(COVERED_DIMS)]}
    assert first == set(COVERED_DIMS) and {cell.case.queries for cell in cells[-8:]} == {131072}


def test_calls_of_one_kernel_are_compiled_in_one_process_and_briefly() -> None:
    cells = make_cells(parser().parse_args(["--preset", "coverage"]), "cuda")
    parts = precompile.parts(cells, "cuda", 16)
    assert len(parts) == 16 and {cell.provider for part in parts for cell in part} == {"flashjvp"}
    assert max(cell.case.queries for part in parts for cell in part) == 2048 + 128

    def is_usual(case: Case) -> bool:
        return (case.head_dim, case.width, case.dtype, case.mask) == (64, 64, "bfloat16", "none") and not case.causal

    usual = [i for i, part in enumerate(parts) for cell in part if is_usual(cell.case) and cell.case.heads == 1]
    assert len(usual) > 8 and len(set(usual)) == 1


PARTS = [{"tangents": "q"}, {"tangents": "kv"}, {"cotangents": "o"}, {"cotangents": "o_t"}, {"value_dim": 5}]


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_a_call_in_part_is_judged(changes: dict[str, object]) -> None:
    case = replace(SMALL, **changes)  # type: ignore[arg-type]
    verdict = gate.check(PROVIDERS["flashjvp"].load(), case, torch.device("cpu"))
    assert not verdict.reason and verdict.err_grad is not None and verdict.err_o_t is not None
    wrong = PROVIDERS["flashjvp"].load()
    off = gate.check(lambda x: tuple(1.1 * y for y in wrong(x)), case, torch.device("cpu"))
    assert "o " in off.reason and "d_v" in off.reason


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_who_takes_a_call_in_part(changes: dict[str, object]) -> None:
    case = replace(SMALL, mode="fwd", dtype="bfloat16", kv_heads=2, **changes)  # type: ignore[arg-type]
    served = {name for name, provider in PROVIDERS.items() if not provider.why_not(case, "cuda")}
    assert "flashjvp" in served and "official" not in served
    assert ("math" in served) == ("value_dim" in changes)


def test_inputs_are_those_that_the_case_names() -> None:
    x = make_inputs(replace(SMALL, tangents="kv", cotangents="o_t", value_dim=5), torch.device("cpu"))
    assert x.q_t is None and x.k_t is not None and x.v_t is not None and x.d_o is None and x.d_o_t is not None
    assert x.v.shape == (1, 1, 24, 5) and x.d_o_t.shape == (1, 2, 20, 5) and x.k.shape == (1, 1, 24, 8)
    with pytest.raises(ValueError, match="cotangents must be one of"):
        replace(SMALL, cotangents="none")
