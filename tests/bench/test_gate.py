from typing import Any

import pytest
import torch

from bench import gate
from bench.providers import PROVIDERS
from tests.bench.planted import PLANTED
from tests.bench.test_cases import make_case
from verify.cases.inputs import Inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True, "keys": 96},
        {"dtype": "float32", "mode": "fwd"},
        {"dtype": "float32", "mode": "bwd", "mask": "bool"},
        {"mask": "additive"},
    ],
)
@pytest.mark.parametrize("name", ["flashjvp", "flashjvp-tiled", "flashjvp-reference", "flashjvp-func-jvp", "math"])
def test_the_providers_pass(name: str, changes: dict[str, Any]) -> None:
    case = make_case(**changes)
    verdict = gate.check(PROVIDERS[name].load(), case, CPU)
    assert not verdict.reason
    unit = torch.finfo(torch.bfloat16 if case.dtype == "bfloat16" else torch.float32).eps
    assert 0 < verdict.err_o < 10 * unit
    assert verdict.err_o_t is not None
    assert 0 < verdict.err_o_t < 10 * unit
    if case.backward:
        assert verdict.err_grad is not None
        assert 0 < verdict.err_grad < 10 * unit
    else:
        assert verdict.err_grad is None


def test_a_longer_shape_is_judged_where_it_is_asked_for() -> None:
    seen: list[tuple[int, ...]] = []
    wrong = PLANTED["planted-wrong-gradient"].load()

    def attention(inputs: Inputs) -> Any:
        seen.append(tuple(inputs.q.shape))
        return wrong(inputs)

    case = make_case(dtype="float32", queries=1000, keys=512)
    assert gate.check(attention, case, CPU, longest=384).reason.startswith("d_v_t")
    assert seen == [(1, 2, 360, 24)]  # 360 = 384 - 128 + 1000 % 128


@pytest.mark.parametrize("mode", ["plain-fwd", "plain-bwd", "plain-fwd+bwd"])
@pytest.mark.parametrize("name", ["flashjvp", "flashjvp-reference", "plain", "plain-flash"])
def test_attention_without_a_jvp_passes(name: str, mode: str) -> None:
    verdict = gate.check(PROVIDERS[name].load(), make_case(mode=mode, kv_heads=4), CPU)
    assert not verdict.reason
    assert verdict.err_o > 0
    assert verdict.err_o_t is None
    assert (verdict.err_grad is not None) == (mode != "plain-fwd")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_difference_quotient_is_judged_as_one_and_shows_what_it_loses(dtype: str) -> None:
    case = make_case(mode="approx-fwd", dtype=dtype)
    verdict = gate.check(PROVIDERS["finite-difference"].load(), case, CPU)
    assert not verdict.reason
    exact = gate.check(PROVIDERS["math"].load(), make_case(mode="fwd", dtype=dtype), CPU)
    assert verdict.err_o_t is not None and exact.err_o_t is not None
    assert verdict.err_o_t > 2 * exact.err_o_t
    wrong = gate.check(PLANTED["planted-difference"].load(), case, CPU)
    assert wrong.reason.startswith("difference quotient")


def test_only_rows_without_a_key_make_the_baseline_wrong() -> None:
    """PyTorch's gradients through a JVP are NaN there; its outputs are right."""
    for mask, forward, backward in (("bool", "", ""), ("empty-rows", "", "d_q")):
        math = PROVIDERS["math"].load()
        for mode, tensor in (("fwd", forward), ("fwd+bwd", backward)):
            reason = gate.check(math, make_case(mask=mask, mode=mode, dtype="float32"), CPU).reason
            assert reason.startswith(tensor) and bool(reason) == bool(tensor)
        ours = gate.check(PROVIDERS["flashjvp"].load(), make_case(mask=mask, dtype="float32"), CPU)
        assert not ours.reason


@pytest.mark.parametrize(
    ("name", "mode", "tensors"),
    [
        ("planted-wrong", "fwd", ["o_t"]),
        ("planted-nan", "fwd", ["o_t"]),
        ("planted-wrong-gradient", "fwd", []),
        ("planted-wrong-gradient", "fwd+bwd", ["d_v_t"]),
        ("planted-prints", "fwd+bwd", []),
    ],
)
def test_a_wrong_result_is_named(name: str, mode: str, tensors: list[str]) -> None:
    verdict = gate.check(PLANTED[name].load(), make_case(mode=mode, dtype="float32"), CPU)
    assert [part.split()[0] for part in verdict.reason.split("; ") if part] == tensors


def test_the_worst_gradient_is_reported_and_a_nan_is_worst() -> None:
    case = make_case(dtype="float32")
    assert gate.check(PLANTED["planted-wrong-gradient"].load(), case, CPU).err_grad == pytest.approx(
        0.01, rel=torch.finfo(torch.float32).eps ** 0.5
    )
    worst = gate.check(PLANTED["planted-nan"].load(), case, CPU).err_grad
    assert worst != worst
