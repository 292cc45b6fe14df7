"""The error budgets pass a correct streaming kernel in every type on every case, and nothing that is wrong."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from verify.budget.rounding import rounding_bounds
from verify.budget.tolerance import DENSE_FACTOR, assert_within, budget, check
from verify.cases.case import Case
from verify.cases.catalogue import CASES
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import NAMES, QUERY_SIDE, Results, allowed, dense64, dense_same_type

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in CASES}
FAULTS = (
    "mu dropped", "a dropped", "delta dropped", "cotangents swapped", "scale missing", "causal off by one",
    "edge unmasked", "tangent of v ignored", "mask ignored in backward", "lse in base 2", "score tangents swapped",
)  # fmt: skip


def kernel_model(inputs: Inputs, fault: str = "") -> Results:
    """MATH.md (1)-(20) with a streaming kernel's roundings: float32, tiles and stored results in the input type."""
    dtype = inputs.q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads, c = inputs.q.shape[-3] // inputs.k.shape[-3], inputs.c

    def low(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    q, k, v = inputs.q.to(wide), inputs.k.to(wide), inputs.v.to(wide)
    given = (inputs.q_t, inputs.k_t, inputs.v_t)
    q_t, k_t, v_t = (torch.zeros_like(x) if t is None else t.to(wide) for x, t in zip((q, k, v), given, strict=True))
    like_o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    G, T = (like_o if d is None else d.to(wide) for d in (inputs.d_o, inputs.d_o_t))
    if fault == "edge unmasked":
        k, v, k_t, v_t = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v, k_t, v_t))
    k, v, k_t, v_t = (x.repeat_interleave(heads, dim=-3) for x in (k, v, k_t, v_t))
    if fault == "tangent of v ignored":
        v_t = torch.zeros_like(v_t)

    keep = allowed(inputs)
    if fault == "causal off by one":
        keep = keep | keep.roll(1, -1)
    if fault == "edge unmasked":
        keep = torch.nn.functional.pad(keep, (0, 1), value=True)
    bias = 0.0 if inputs.mask is None or inputs.mask.dtype == torch.bool else inputs.mask.to(wide)
    S = (c * (q @ k.mT) + bias).masked_fill(~keep, -torch.inf)
    top = S.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = torch.exp(S - top)
    l = p.sum(-1, keepdim=True)
    l_safe = l.masked_fill(l == 0, 1.0)
    S_t = c * (q_t @ k.mT + q @ k_t.mT)
    mu = (p * S_t).sum(-1, keepdim=True) / l_safe
    if fault == "score tangents swapped":
        S_t = c * (q_t @ k_t.mT)
    o = low(low(p) @ v / l_safe)
    o_t = low((low(p * (S_t - mu)) @ v + low(p) @ v_t) / l_safe)

    if fault == "cotangents swapped":
        G, T = T, G
    lse = (top + l.log()).nan_to_num(neginf=0.0)
    if fault == "lse in base 2":
        lse = lse * 1.4426950408889634
    if fault == "mask ignored in backward":
        S = c * (q @ k.mT)
    P = torch.exp(S - lse)
    z = S_t if fault == "mu dropped" else S_t - mu
    a = (T * o).sum(-1, keepdim=True) * (fault != "a dropped")
    delta = (G * o + T * o_t).sum(-1, keepdim=True) * (fault != "delta dropped")
    D = T @ v.mT - a
    dS_t = low(P * D)
    dS = low(P * (z * D + G @ v.mT + T @ v_t.mT - delta))
    factor = 1.0 if fault == "scale missing" else c
    grads = {
        "d_q": c * (dS @ k + dS_t @ k_t), "d_q_t": c * dS_t @ k,
        "d_k": factor * (dS.mT @ q + dS_t.mT @ q_t), "d_k_t": c * dS_t.mT @ q,
        "d_v": low(P).mT @ G + low(P * z).mT @ T, "d_v_t": low(P).mT @ T,
    }  # fmt: skip
    for name in ("d_k", "d_v", "d_k_t", "d_v_t"):
        grads[name] = grads[name].unflatten(-3, (-1, heads)).sum(-3)[..., : inputs.k.shape[-2], :]
    for name, tangent in zip(("d_q_t", "d_k_t", "d_v_t"), given, strict=True):
        if tangent is None:
            del grads[name]
    results = {"o": o, **({"o_t": o_t} if inputs.has_tangent else {}), **grads}
    return Results(**{name: results[name].to(dtype) if name in results else None for name in NAMES})


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [case for case in CASES if 0 not in (*case.batch, case.n)], ids=str)
def test_a_correct_kernel_keeps_the_budget(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert_within(inputs, kernel_model(inputs))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_equal_heads_of_a_group_round_alike(dtype: torch.dtype, seed: int) -> None:
    """Their errors in d_k and d_v add up; as if they were independent, most of these budgets were too small."""
    case = Case("alike", (), m=7, n=16, d=8, dv=24, q_heads=6, kv_heads=2, layout="expanded", magnitude=10.0)
    inputs = make_inputs(case, dtype, seed=seed)
    assert_within(inputs, kernel_model(inputs))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_far_outside(fault: str, dtype: torch.dtype) -> None:
    """On numbers of an everyday size: at least one tensor misses its budget several times over."""
    case = Case("faulty", q_heads=2, kv_heads=1, m=48, n=40, is_causal="causal" in fault)
    if "mask" in fault and "unmasked" not in fault:
        case = replace(case, mask="bool")
    inputs = make_inputs(case, dtype)
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense_same_type(inputs))
    assert all(row.ok for row in check(kernel_model(inputs), exact, budgets))
    rows = check(kernel_model(inputs, fault), exact, budgets)
    assert not all(row.ok for row in rows)
    assert max(row.frobenius / row.frobenius_budget for row in rows) > 4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda dtype: str(dtype)[6:])
def test_everyday_numbers_leave_twice_what_dense_attention_loses(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("everyday", batch=(2,), q_heads=4, kv_heads=4, m=128, n=128, d=64, dv=64), dtype)
    budgets = budget(inputs, dense64(inputs), dense_same_type(inputs))
    assert {name: b.frobenius for name, b in budgets.items()} == {
        name: DENSE_FACTOR * b.dense_frobenius for name, b in budgets.items()
    }


@pytest.mark.parametrize("name", ("square", "one_hot", "large_mu", "constant_keys", "scores_30", "causal_64_64", "gqa"))
def test_rounding_bounds_are_tight(name: str) -> None:
    """A bound far above a correct kernel's error could hide a fault: the error is a sizeable part of the bound."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make_inputs(BY_NAME[name], dtype)
        exact, model, bounds = dense64(inputs), kernel_model(inputs), rounding_bounds(inputs)
        for tensor in NAMES:
            error = (getattr(model, tensor).double() - getattr(exact, tensor)).norm().item()
            assert bounds[tensor].whole / 8 < error <= bounds[tensor].whole, tensor


@pytest.mark.parametrize("name", ("mask_bool_empty_rows", "causal_33_80"))
def test_exact_zeros_must_be_zero(name: str) -> None:
    """Rows that no key serves, keys that no query sees: the smallest number there fails."""
    inputs = make_inputs(BY_NAME[name], torch.float32)
    exact = dense64(inputs)
    budgets = budget(inputs, exact, dense_same_type(inputs))
    correct, keep = dense_same_type(inputs), allowed(inputs)
    assert all(row.ok for row in check(correct, exact, budgets))
    spoiled = 0
    for tensor in NAMES:
        unused = ~keep.any(-1 if tensor in QUERY_SIDE else -2)
        if unused.any():
            spoiled += 1
            wrong = getattr(correct, tensor).masked_fill(unused[..., None], 1e-30)
            rows = check(replace(correct, **{tensor: wrong}), exact, budgets)
            assert [row.tensor for row in rows if not row.ok] == [tensor]
    assert spoiled == 4


def test_nan_missing_and_misshapen_results_fail() -> None:
    inputs = make_inputs(BY_NAME["square"], torch.float32)
    exact, dense = dense64(inputs), dense_same_type(inputs)
    budgets = budget(inputs, exact, dense)
    poisoned = dense.d_q.clone()
    poisoned[0, 0, 0, 0] = torch.nan
    for wrong in (replace(dense, d_q=poisoned), replace(dense, d_q=None), replace(dense, d_q=dense.d_q[..., :1, :])):
        assert [row.tensor for row in check(wrong, exact, budgets) if not row.ok] == ["d_q"]


def test_assert_within_names_the_tensor() -> None:
    inputs = make_inputs(BY_NAME["square"], torch.float32)
    dense = dense_same_type(inputs)
    with pytest.raises(AssertionError, match="d_k_t: error"):
        assert_within(inputs, replace(dense, d_k_t=2 * dense.d_k_t))


@pytest.mark.parametrize(("distance", "may_vanish"), [(-89.0, True), (-80.0, False)])
def test_only_subnormal_probabilities_may_be_flushed_to_zero(distance: float, may_vanish: bool) -> None:
    """exp(-89) is below the smallest normal float32, exp(-80) is not; large cotangents make what P carries large."""
    k = torch.tensor([[[0.0], [distance]]])
    v, k_t, v_t = torch.tensor([[[[1.0], [3.0]]], [[[2.0], [-1.0]]], [[[-2.0], [4.0]]]])
    q, q_t, d_o, d_o_t = torch.tensor([[[[1.0]]], [[[0.5]]], [[[1e4]]], [[[-3e4]]]])
    inputs = Inputs(q, k, v, q_t, k_t, v_t, d_o=d_o, d_o_t=d_o_t, scale=1.0)
    exact = dense64(inputs)
    kept = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    grads = {name: getattr(exact, name) * kept for name in ("d_v", "d_v_t")}
    rows = {row.tensor: row.ok for row in check(replace(exact, **grads), exact, budget(inputs, exact, exact))}
    assert all(rows[name] == may_vanish for name in grads)
