"""float32 tensors on the warp-specialised kernels where TF32 is allowed: as exact as TF32, whatever their units are."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.flashjvp.kernels.test_hopper import CASES, NOT_SERVED, expected, pipelines_in_use
from tests.tiers import examples
from verify.budget.arithmetic import to_11_bits
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.checks.emulated import RoundedProducts, dense_tf32, replayed, tf32
from verify.emulator.gluon import emulated
from verify.oracles.attention import NAMES, Results, Subject, dense64, dense_same_type, run

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator serves machines without a GPU")
SMALL = Case("units", batch=(1,), q_heads=1, kv_heads=1, m=20, n=40, d=64, dv=64)
# What is scaled is copied, so any layout is served; head dims are padded before that (backends/copies.py). A tangent of
# v alone is left to the portable kernels in half types.
SERVED_IN_TF32 = (
    Case("unaligned_rows", batch=(1,), m=40, n=50, d=64, dv=64, layout="padded"),
    Case("broadcast", batch=(2,), m=40, n=50, d=64, dv=64, layout="expanded"),
    Case("head_dims_36_52", batch=(1,), m=40, n=50, d=36, dv=52),
    Case("v_t_alone", batch=(1,), m=64, n=70, d=64, dv=64, tangents=("v",)),
)
WITHOUT_BIAS = tuple(
    case for case in CASES if not (case.mask or "").startswith("additive")
)  # with one TF32 has portable kernels
SERVED_BY_OTHERS = tuple(case for case in NOT_SERVED if case.name != "v_t_alone")


@pytest.fixture
def allowed() -> Iterator[None]:
    """PyTorch's setting that allows TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def judge(case: Case, ordered: bool, dense: Callable[[Inputs], Results], device: str, families: bool = True) -> None:
    inputs = make_inputs(case, torch.float32, device)
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense(inputs))
    with pipelines_in_use(ordered) as launched:
        results = run(inputs, "triton")
    assert set(launched) == (expected(inputs, ordered, False) if families else set())
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@ON_CPU
@pytest.mark.sampled(of=48)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", [*WITHOUT_BIAS, *SERVED_IN_TF32], ids=str)
def test_emulated(case: Case, ordered: bool) -> None:
    with emulated(), tf32():
        judge(case, ordered, dense_tf32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", [*WITHOUT_BIAS, *SERVED_IN_TF32], ids=str)
def test_compiled(case: Case, ordered: bool, allowed: None) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, ordered, dense_same_type, "cuda")


@ON_CPU
@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("case", SERVED_BY_OTHERS, ids=str)
def test_other_calls_are_rounded_as_well(case: Case) -> None:
    """To the nearest: numbers that are rounded already give the same outputs, bit by bit."""
    inputs = make_inputs(case, torch.float32)
    before = inputs.map(lambda x: to_11_bits(x) if x.dtype == torch.float32 and x is not inputs.mask else x)
    with emulated(), tf32():
        judge(case, True, dense_tf32, "cpu", families=False)
        first, second = run(inputs, "triton"), run(before, "triton")
    assert torch.equal(first.o, second.o) and not torch.equal(inputs.q, before.q)
    assert first.o_t is None or torch.equal(first.o_t, second.o_t)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED_BY_OTHERS, ids=str)
def test_other_calls_take_the_other_kernels(case: Case, allowed: None) -> None:
    judge(case, True, dense_same_type, "cuda", families=False)


def results_of(inputs: Inputs, ordered: bool = False) -> Results:
    with emulated(), tf32(), pipelines_in_use(ordered) as launched:
        found = run(inputs, "triton")
    assert launched
    return found


def times(x: Tensor | None, exponent: int) -> Tensor | None:
    return None if x is None else torch.ldexp(x, torch.tensor(exponent))


@ON_CPU
@settings(max_examples=examples(10), deadline=None)
@given(
    queries=st.integers(-25, 25), values=st.integers(-25, 25), tangents=st.integers(-25, 25),
    cotangents=st.integers(-25, 25), seed=st.integers(0, 99),
)  # fmt: skip
def test_units_change_no_bit(queries: int, values: int, tangents: int, cotangents: int, seed: int) -> None:
    """Powers of two on tensors that a unit is shared by, and on q and k the other way round."""
    one = make_inputs(SMALL, torch.float32, seed=seed)
    changed: dict[str, Any] = {
        "q": times(one.q, queries), "k": times(one.k, -queries), "v": times(one.v, values),
        "q_t": times(one.q_t, queries + tangents), "k_t": times(one.k_t, tangents - queries),
        "v_t": times(one.v_t, values + tangents), "d_o": times(one.d_o, cotangents),
        "d_o_t": times(one.d_o_t, cotangents - tangents),
    }  # fmt: skip
    found, scaled = results_of(one, ordered=True), results_of(replace(one, **changed), ordered=True)
    exponents = {
        "o": values, "o_t": values + tangents, "d_q": values + cotangents - queries,
        "d_k": values + cotangents + queries, "d_v": cotangents, "d_q_t": values + cotangents - tangents - queries,
        "d_k_t": values + cotangents - tangents + queries, "d_v_t": cotangents - tangents,
    }  # fmt: skip
    for name in NAMES:
        x, y = times(getattr(found, name), exponents[name]), getattr(scaled, name)
        assert torch.equal(x, y), name


@ON_CPU
@settings(max_examples=examples(15), deadline=None)
@given(
    exponents=st.fixed_dictionaries(
        {name: st.integers(-30, 30) for name in ("q", "k", "v", "q_t", "k_t", "v_t", "d_o", "d_o_t")}
    ),
    seed=st.integers(0, 99),
)
def test_units_of_their_own(exponents: dict[str, int], seed: int) -> None:
    """Tensors of any lengths: the longest rows rule, and no result leaves the range of float16 on the way."""
    one = make_inputs(SMALL, torch.float32, seed=seed)
    if exponents["q"] + exponents["k"] > 4:  # scores of more than 100: rounding decides which key is the one
        exponents = {**exponents, "k": 4 - exponents["q"]}
    inputs = replace(one, **{name: times(getattr(one, name), e) for name, e in exponents.items()})
    with tf32():
        exact = dense64(inputs)
        budgets = budget(inputs, exact, dense_tf32(inputs))
    verdicts = check(results_of(inputs), exact, budgets)
    assert not [row for row in verdicts if not row.ok]


@ON_CPU
def test_repeated_calls_are_replayed() -> None:
    with tf32():
        found = replayed(make_inputs(SMALL, torch.float32), Subject("triton"))
    assert found and all(x.ok for x in found)


@ON_CPU
@pytest.mark.parametrize("name", ["q", "k", "v", "q_t", "k_t", "v_t", "d_o", "d_o_t"])
def test_zeros_have_any_unit(name: str) -> None:
    one = make_inputs(SMALL, torch.float32)
    inputs = replace(one, **{name: torch.zeros_like(getattr(one, name))})
    with tf32():
        exact = dense64(inputs)
        budgets = budget(inputs, exact, dense_tf32(inputs))
    assert not [row for row in check(results_of(inputs), exact, budgets) if not row.ok]


@ON_CPU
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("row", [3, 60])
@pytest.mark.parametrize("name", ["q", "k", "v", "q_t", "k_t", "v_t", "d_o", "d_o_t"])
def test_one_row_may_be_far_longer(name: str, row: int) -> None:
    """It sets the unit, whichever program reads it; in that of the others it would be infinite."""
    inputs = make_inputs(replace(SMALL, m=70, n=70), torch.float32)
    getattr(inputs, name)[..., row, :] *= 2.0**10
    with tf32():
        exact = dense64(inputs)
        budgets = budget(inputs, exact, dense_tf32(inputs))
    assert not [verdict for verdict in check(results_of(inputs), exact, budgets) if not verdict.ok]


@ON_CPU
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    inputs = make_inputs(SMALL, torch.float32)
    inputs.v[..., 3, 5] = value
    found = results_of(inputs)
    assert not found.o[..., 5].isfinite().any()
    assert found.o[..., :5].isfinite().all() or value == torch.inf  # an infinite row is the longest one


def test_products_are_rounded_in_the_oracle() -> None:
    x = torch.tensor([[1 + 2.0**-11 + 2.0**-20]])
    with RoundedProducts():
        assert (x @ torch.ones(1, 1)).item() == 1 + 2.0**-10
