from typing import Any

import pytest
import torch

from bench.cases import Case, inputs_mib, least_mib, make_inputs, operations, reduced, require_gradients, six

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
        ({}, 42),
        ({"causal": True}, 42),
        ({"mode": "fwd", "causal": True, "keys": 96}, 6),
        ({"causal": True, "keys": 96}, 21),
    ],
)
def test_operations_are_counted_by_the_published_formula(changes: dict[str, Any], factor: int) -> None:
    case = make_case(**changes)
    assert operations(case) == factor * 2 * 4 * 96 * case.keys * 24


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_memory_is_that_of_the_tensors(dtype: str, mode: str) -> None:
    case = make_case(dtype=dtype, mode=mode)
    inputs = make_inputs(case, torch.device("cpu"))
    held = [x for x in (*six(inputs), inputs.d_o, inputs.d_o_t) if x is not None]
    assert len(held) == (8 if mode == "fwd+bwd" else 6)
    assert inputs_mib(case) == sum(x.nbytes for x in held) / 2**20
    statistic = torch.empty(2, 4, 96, dtype=torch.float64 if dtype == "float64" else torch.float32)
    made = [inputs.q, inputs.q, *(six(inputs) if case.backward else ())]
    made += [statistic] * (4 if case.backward else 2)
    assert least_mib(case) == sum(x.nbytes for x in (*held, *made)) / 2**20


def test_inputs_have_the_shapes_of_the_case_and_repeat_for_a_seed() -> None:
    inputs = make_inputs(make_case(causal=True), torch.device("cpu"))
    assert [tuple(x.shape) for x in six(inputs)] == [(2, 4, 96, 24), (2, 2, 160, 24), (2, 2, 160, 24)] * 2
    assert inputs.is_causal
    assert all(x.dtype == torch.bfloat16 and not x.requires_grad for x in six(inputs))
    again = make_inputs(make_case(causal=True), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(six(inputs), six(again), strict=True))
    assert not torch.equal(inputs.q, inputs.q_t)
    require_gradients(inputs)
    assert all(x.requires_grad and x.is_leaf for x in six(inputs))


def test_the_reduced_shape_keeps_what_a_kernel_can_get_wrong() -> None:
    case = make_case(batch=8, heads=24, kv_heads=8, queries=8192, keys=4097, head_dim=72, causal=True)
    small = reduced(case)
    assert (small.batch, small.heads, small.kv_heads, small.queries, small.keys) == (2, 6, 2, 256, 129)
    assert (small.head_dim, small.dtype, small.causal, small.mode) == (72, "bfloat16", True, "fwd+bwd")
    tiny = make_case(batch=1, heads=3, kv_heads=1, queries=1, keys=200)
    assert reduced(tiny) == tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "multiple of kv-heads"),
        ({"head_dim": 0}, "at least 1"),
        ({"mode": "bwd"}, "mode must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"mask": "bool"}, "mask must be none"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_case(**changes)
