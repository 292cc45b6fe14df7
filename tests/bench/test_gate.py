from typing import Any

import pytest
import torch

from bench import gate
from bench.providers import PROVIDERS
from tests.bench.planted import PLANTED
from tests.bench.test_cases import make_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"causal": True, "keys": 96}, {"dtype": "float32", "mode": "fwd"}])
@pytest.mark.parametrize("name", ["flashjvp", "flashjvp-tiled", "flashjvp-reference", "math"])
def test_the_providers_pass(name: str, changes: dict[str, Any]) -> None:
    case = make_case(**changes)
    verdict = gate.check(PROVIDERS[name].load(), case, CPU)
    assert not verdict.reason
    unit = torch.finfo(torch.bfloat16 if case.dtype == "bfloat16" else torch.float32).eps
    assert 0 < verdict.err_o < 10 * unit
    assert 0 < verdict.err_o_t < 10 * unit
    if case.backward:
        assert verdict.err_grad is not None
        assert 0 < verdict.err_grad < 10 * unit
    else:
        assert verdict.err_grad is None


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
