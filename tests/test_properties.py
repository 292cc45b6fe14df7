"""What attention must satisfy whatever the numbers: hypothesis draws the calls, rounding bounds say how closely.

An identity relates results of several calls. Each result lies within its rounding bound (verify/rounding.py) of the
exact one, for which the identity holds, so the two sides differ by at most the sum of the bounds that enter.
"""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from verify.cases import Case, Inputs, make_inputs
from verify.oracles import NAMES, QUERY_SIDE, Backend, Results, run
from verify.rounding import rounding_bounds
from verify.strategies import cases, seeds
from verify.tolerance import assert_within

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")
unshrunk = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter takes seconds a call
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
tangent_cases = cases().filter(lambda case: bool(case.tangents))


def assert_close(a: Results, b: Results, *inputs: Inputs) -> None:
    """Each tensor of a and b is the same within the rounding bounds of `inputs`, the calls that gave them."""
    bounds = [rounding_bounds(x) for x in inputs]
    for name in NAMES:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert (x.double() - y.double()).norm() <= sum(bound[name].whole for bound in bounds), name


def dot(x: Tensor | None, y: Tensor | None) -> float:
    return 0.0 if x is None or y is None else (x.double() * y.double()).sum().item()


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else x.double().norm().item()


def coarse(x: Tensor) -> Tensor:
    """x in steps of 1/64: sums of a few such numbers are exact in float32."""
    return (x * 64).round() / 64


@settings(max_examples=80)
@given(cases(), seeds, dtypes)
def test_tiled_is_exact_within_its_budget(case: Case, seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    assert_within(inputs, run(inputs, "tiled"))


@interpreted
@settings(max_examples=15, phases=unshrunk)
@given(cases(), seeds, st.sampled_from((torch.float32, torch.float16)))
def test_triton_is_exact_within_its_budget(case: Case, seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    assert_within(inputs, run(inputs, "triton"))


def check_linear_in_tangents(case: Case, seed: int, x: float, y: float, backend: Backend) -> None:
    tangents = ("q_t", "k_t", "v_t")
    one = make_inputs(replace(case, cotangents=("o", "o_t")), torch.float32, seed=seed)
    two = make_inputs(replace(case, cotangents=("o", "o_t")), torch.float32, seed=seed + 1)
    one = replace(one, **{t: coarse(getattr(one, t)) for t in tangents if getattr(one, t) is not None})
    two = replace(one, **{t: coarse(getattr(two, t)) for t in tangents if getattr(one, t) is not None})
    sums = {t: x * getattr(one, t) + y * getattr(two, t) for t in tangents if getattr(one, t) is not None}
    both = replace(one, **sums)
    a, b, ab = (run(inputs, backend).o_t for inputs in (one, two, both))
    assert a is not None and b is not None and ab is not None
    bound = [rounding_bounds(inputs)["o_t"].whole for inputs in (one, two, both)]
    assert norm(ab.double() - x * a.double() - y * b.double()) <= abs(x) * bound[0] + abs(y) * bound[1] + bound[2]


factors = st.sampled_from((1.0, -1.0, 0.5, 3.0))


@settings(max_examples=50)
@given(tangent_cases, seeds, factors, factors)
def test_tangents_enter_linearly(case: Case, seed: int, x: float, y: float) -> None:
    check_linear_in_tangents(case, seed, x, y, "tiled")


@interpreted
@settings(max_examples=5, phases=unshrunk)
@given(tangent_cases, seeds, factors, factors)
def test_tangents_enter_linearly_triton(case: Case, seed: int, x: float, y: float) -> None:
    check_linear_in_tangents(case, seed, x, y, "triton")


def check_adjoint(case: Case, seed: int, backend: Backend) -> None:
    """<JVP(x_t), d> = <x_t, VJP(d)>: the forward-mode tangent against the plain backward pass."""
    forward = make_inputs(replace(case, cotangents=("o_t",)), torch.float32, seed=seed)
    d = forward.d_o_t
    plain = replace(forward, q_t=None, k_t=None, v_t=None, d_o=d, d_o_t=None)
    o_t, vjp = run(forward, backend).o_t, run(plain, backend)
    tangents = (forward.q_t, forward.k_t, forward.v_t)
    grads = (vjp.d_q, vjp.d_k, vjp.d_v)
    bounds = rounding_bounds(plain)
    slack = rounding_bounds(forward)["o_t"].whole * norm(d)
    slack += sum(norm(t) * bounds[g].whole for t, g in zip(tangents, ("d_q", "d_k", "d_v"), strict=True))
    assert abs(dot(o_t, d) - sum(dot(t, g) for t, g in zip(tangents, grads, strict=True))) <= slack


@settings(max_examples=50)
@given(tangent_cases, seeds)
def test_forward_and_reverse_mode_are_adjoint(case: Case, seed: int) -> None:
    check_adjoint(case, seed, "tiled")


@interpreted
@settings(max_examples=5, phases=unshrunk)
@given(tangent_cases, seeds)
def test_forward_and_reverse_mode_are_adjoint_triton(case: Case, seed: int) -> None:
    check_adjoint(case, seed, "triton")


@settings(max_examples=50)
@given(cases(), seeds, st.randoms(use_true_random=False))
def test_keys_may_be_permuted(case: Case, seed: int, random: random.Random) -> None:
    inputs = make_inputs(replace(case, is_causal=False), torch.float32, seed=seed)
    order = list(range(case.n))
    random.shuffle(order)

    def keys(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., order, :]

    mask = inputs.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., order]
    k, v = inputs.k[..., order, :], inputs.v[..., order, :]
    permuted = replace(inputs, k=k, v=v, k_t=keys(inputs.k_t), v_t=keys(inputs.v_t), mask=mask)
    results = run(inputs, "tiled")
    expected = {name: keys(getattr(results, name)) for name in NAMES if name not in QUERY_SIDE}
    assert_close(run(permuted, "tiled"), replace(results, **expected), inputs, permuted)


@settings(max_examples=50)
@given(cases(), seeds)
def test_a_constant_added_to_a_row_of_scores_changes_nothing(case: Case, seed: int) -> None:
    case = replace(case, mask="additive_float32", mask_shape=case.mask_shape if case.mask else "full")
    inputs = make_inputs(case, torch.float32, seed=seed)
    assert inputs.mask is not None
    mask = coarse(inputs.mask)
    shift = 7 * torch.arange(-5, case.m - 5, dtype=torch.float32)[:, None].clamp(max=30)
    inputs, shifted = replace(inputs, mask=mask), replace(inputs, mask=mask + shift)
    assert_close(run(inputs, "tiled"), run(shifted, "tiled"), inputs, shifted)


@settings(max_examples=50)
@given(cases(), seeds, st.data())
def test_heads_and_batch_elements_are_independent(case: Case, seed: int, data: st.DataObject) -> None:
    assume(0 not in case.batch)
    inputs = make_inputs(case, torch.float32, seed=seed)
    batch = tuple(data.draw(st.integers(0, size - 1)) for size in case.batch)
    head = data.draw(st.integers(0, case.kv_heads - 1))
    part = inputs.group(batch, head)
    assert_close(run(part, "tiled"), run(inputs, "tiled").group(batch, head), part, part)


@settings(max_examples=50)
@given(cases(), seeds)
def test_strides_do_not_matter(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, seed=seed)
    contiguous = inputs.map(torch.Tensor.contiguous)
    assert_close(run(inputs, "tiled"), run(contiguous, "tiled"), inputs, contiguous)


@interpreted
@settings(max_examples=5, phases=unshrunk)
@given(cases(), seeds)
def test_strides_change_no_bit_in_the_kernels(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, seed=seed)
    strided, contiguous = run(inputs, "triton"), run(inputs.map(torch.Tensor.contiguous), "triton")
    for name in NAMES:
        x, y = getattr(strided, name), getattr(contiguous, name)
        assert x is y is None or torch.equal(x, y), name
