from typing import Any

import pytest
import torch

from bench.cases import (
    OPERATIONS,
    Case,
    differentiable,
    inputs_mib,
    least_mib,
    make_inputs,
    operations,
    reduced,
    require_gradients,
)
from reports.schema import MODES

SHAPE: dict[str, Any] = {
    "mode": "fwd+bwd",
    "batch": 2,
    "heads": 4,
    "kv_heads": 2,
    "queries": 96,
    "keys": 160,
    "head_dim": 24,
    "dtype": "bfloat16",
    "causal": False,
}


def make_case(**changes: Any) -> Case:
    return Case(**(SHAPE | changes))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"mode": "fwd"}, 12),
        ({"mode": "bwd"}, 30),
        ({}, 42),
        ({"mode": "plain-fwd"}, 4),
        ({"mode": "plain-bwd"}, 10),
        ({"mode": "plain-fwd+bwd"}, 14),
        ({"mode": "approx-fwd"}, 8),
        ({"causal": True}, 42),
        ({"mode": "fwd", "causal": True, "keys": 96}, 6),
        ({"causal": True, "keys": 96}, 21),
    ],
)
def test_operations_are_counted_by_the_published_formula(changes: dict[str, Any], factor: int) -> None:
    case = make_case(**changes)
    assert operations(case) == factor * 2 * 4 * 96 * case.keys * 24


def test_modes_are_those_of_a_row() -> None:
    assert tuple(OPERATIONS) == MODES


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(
    ("mode", "inputs_count", "outputs", "statistics"),
    [
        ("fwd", 6, 2, 2),
        ("bwd", 8, 8, 4),
        ("fwd+bwd", 8, 8, 4),
        ("plain-fwd", 3, 1, 1),
        ("plain-bwd", 4, 4, 2),
        ("approx-fwd", 6, 2, 2),
    ],
)
def test_memory_is_that_of_the_tensors(
    mask: str, dtype: str, mode: str, inputs_count: int, outputs: int, statistics: int
) -> None:
    case = make_case(dtype=dtype, mode=mode, mask=mask)
    inputs = make_inputs(case, torch.device("cpu"))
    held = [x for x in (*differentiable(inputs), inputs.d_o, inputs.d_o_t) if x is not None]
    assert len(held) == inputs_count
    held += [] if inputs.mask is None else [inputs.mask]
    assert inputs_mib(case) == sum(x.nbytes for x in held) / 2**20
    made = [torch.empty(2, 4, 96, dtype=torch.float64 if dtype == "float64" else torch.float32)] * statistics
    made += [inputs.q] * (1 if case.plain else 2) + (list(differentiable(inputs)) if case.backward else [])
    assert len(made) == outputs + statistics
    assert least_mib(case) == sum(x.nbytes for x in (*held, *made)) / 2**20


def test_masks_forbid_some_pairs_and_only_one_leaves_queries_without_a_key() -> None:
    device = torch.device("cpu")
    for causal in (False, True):
        for kind in ("bool", "additive"):
            mask = make_inputs(make_case(mask=kind, causal=causal), device).mask
            assert mask is not None and mask.shape == (96, 160)
            allowed = mask if kind == "bool" else ~mask.isneginf()
            assert mask.dtype == (torch.bool if kind == "bool" else torch.bfloat16)
            assert (allowed.tril() if causal else allowed).any(-1).all()
            assert 0.5 < allowed.double().mean() < 0.9
    empty = make_inputs(make_case(mask="empty-rows"), device).mask
    assert empty is not None
    assert (~empty.any(-1)).nonzero().flatten().tolist() == list(range(0, 96, 3))


def test_inputs_have_the_shapes_of_the_case_and_repeat_for_a_seed() -> None:
    inputs = make_inputs(make_case(causal=True), torch.device("cpu"))
    assert [tuple(x.shape) for x in differentiable(inputs)] == [(2, 4, 96, 24), (2, 2, 160, 24), (2, 2, 160, 24)] * 2
    assert inputs.is_causal
    assert all(x.dtype == torch.bfloat16 and not x.requires_grad for x in differentiable(inputs))
    again = make_inputs(make_case(causal=True), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(differentiable(inputs), differentiable(again), strict=True))
    assert not torch.equal(inputs.q, inputs.q_t)
    require_gradients(inputs)
    assert all(x.requires_grad and x.is_leaf for x in differentiable(inputs))


def test_the_reduced_shape_keeps_what_a_kernel_can_get_wrong() -> None:
    case = make_case(batch=8, heads=24, kv_heads=8, queries=8192, keys=4097, head_dim=72, causal=True)
    small = reduced(case)
    assert (small.batch, small.heads, small.kv_heads, small.queries, small.keys) == (2, 6, 2, 256, 129)
    assert (small.head_dim, small.dtype, small.causal, small.mode) == (72, "bfloat16", True, "fwd+bwd")
    long = reduced(case, 2176)
    assert (long.batch, long.heads, long.kv_heads, long.queries, long.keys) == (1, 3, 1, 2176, 2049)
    tiny = make_case(batch=1, heads=3, kv_heads=1, queries=1, keys=200)
    assert reduced(tiny) == tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "multiple of kv-heads"),
        ({"head_dim": 0}, "at least 1"),
        ({"mode": "backward"}, "mode must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"mask": "causal"}, "mask must be one of"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_case(**changes)
