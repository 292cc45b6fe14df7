"""What attention must satisfy whatever the numbers: calls that hypothesis draws, oracles of verify/oracles."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.tiers import examples
from verify.budget.tolerance import Identity, assert_within, same_results
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.cases.strategies import cases, seeds
from verify.oracles import identities
from verify.oracles.attention import NAMES, Subject, run

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")
unshrunk = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter takes seconds a call
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
tangent_cases = cases().filter(lambda case: bool(case.tangents))


TILED, TRITON = Subject("tiled"), Subject("triton")


def assert_holds(identities: list[Identity]) -> None:
    assert [identity for identity in identities if not identity.ok] == []


@settings(max_examples=examples(80))
@given(cases(), seeds, dtypes)
def test_tiled_is_exact_within_its_budget(case: Case, seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    assert_within(inputs, run(inputs, "tiled"))


@interpreted
@settings(max_examples=examples(15), phases=unshrunk)
@given(cases(), seeds, st.sampled_from((torch.float32, torch.float16)))
def test_triton_is_exact_within_its_budget(case: Case, seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    assert_within(inputs, run(inputs, "triton"))


factors = st.sampled_from((1.0, -1.0, 0.5, 3.0))


@settings(max_examples=examples(50))
@given(tangent_cases, seeds, factors, factors)
def test_tangents_enter_linearly(case: Case, seed: int, a: float, b: float) -> None:
    assert_holds(identities.linear_in_tangents(make_inputs(case, torch.float32, seed=seed), TILED, a, b))


@interpreted
@settings(max_examples=examples(5), phases=unshrunk)
@given(tangent_cases, seeds, factors, factors)
def test_tangents_enter_linearly_triton(case: Case, seed: int, a: float, b: float) -> None:
    assert_holds(identities.linear_in_tangents(make_inputs(case, torch.float32, seed=seed), TRITON, a, b))


@settings(max_examples=examples(50))
@given(tangent_cases, seeds)
def test_forward_and_reverse_mode_are_adjoint(case: Case, seed: int) -> None:
    case = replace(case, cotangents=("o_t",))
    assert_holds(identities.adjoint(make_inputs(case, torch.float32, seed=seed), TILED))


@interpreted
@settings(max_examples=examples(5), phases=unshrunk)
@given(tangent_cases, seeds)
def test_forward_and_reverse_mode_are_adjoint_triton(case: Case, seed: int) -> None:
    case = replace(case, cotangents=("o_t",))
    assert_holds(identities.adjoint(make_inputs(case, torch.float32, seed=seed), TRITON))


@settings(max_examples=examples(50))
@given(cases(), seeds, st.randoms(use_true_random=False))
def test_keys_may_be_permuted(case: Case, seed: int, random: random.Random) -> None:
    order = list(range(case.n))
    random.shuffle(order)
    assert_holds(identities.permuted_keys(make_inputs(case, torch.float32, seed=seed), TILED, order))


@settings(max_examples=examples(50))
@given(cases(), seeds, dtypes)
def test_keys_may_be_split_and_merged(case: Case, seed: int, dtype: torch.dtype) -> None:
    assert_holds(identities.merged_keys(make_inputs(case, dtype, seed=seed), TILED))


@settings(max_examples=examples(50))
@given(cases(), seeds)
def test_a_constant_added_to_a_row_of_scores_changes_nothing(case: Case, seed: int) -> None:
    case = replace(case, mask="additive_float32", mask_shape=case.mask_shape if case.mask else "full")
    assert_holds(identities.shifted_rows(make_inputs(case, torch.float32, seed=seed), TILED))


@settings(max_examples=examples(50))
@given(cases(), seeds, st.data())
def test_heads_and_batch_elements_are_independent(case: Case, seed: int, data: st.DataObject) -> None:
    assume(0 not in case.batch)
    batch = tuple(data.draw(st.integers(0, size - 1)) for size in case.batch)
    head = data.draw(st.integers(0, case.kv_heads - 1))
    inputs = make_inputs(case, torch.float32, seed=seed)
    assert_holds(identities.independent_heads(inputs, TILED, (batch, head)))


@settings(max_examples=examples(20))
@given(cases(), seeds, dtypes)
def test_derivatives_are_limits_of_differences(case: Case, seed: int, dtype: torch.dtype) -> None:
    case = replace(case, magnitude=1.0, kind="normal")  # a step is small against what the derivatives vary over
    assert_holds(identities.finite_differences(make_inputs(case, dtype, seed=seed), TILED))


@settings(max_examples=examples(50))
@given(cases(), seeds)
def test_strides_do_not_matter(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, seed=seed)
    contiguous = inputs.map(torch.Tensor.contiguous)
    assert_holds(same_results(run(inputs, "tiled"), run(contiguous, "tiled"), inputs, contiguous))


@interpreted
@settings(max_examples=examples(5), phases=unshrunk)
@given(cases(), seeds)
def test_strides_change_no_bit_in_the_kernels(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, seed=seed)
    strided, contiguous = run(inputs, "triton"), run(inputs.map(torch.Tensor.contiguous), "triton")
    for name in NAMES:
        x, y = getattr(strided, name), getattr(contiguous, name)
        assert x is y is None or torch.equal(x, y), name
