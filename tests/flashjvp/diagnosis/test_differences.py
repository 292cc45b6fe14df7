"""Central differences tell right from wrong derivatives, and say how far to trust them."""

import math

import pytest
import torch
from torch import Tensor

from flashjvp.diagnosis import differences

X = torch.randn(7, dtype=torch.float64)
ALONG = torch.randn(7, dtype=torch.float64)


def smooth(step: float) -> Tensor:
    return torch.exp((X + step * ALONG).sin())


def exact() -> Tensor:
    return smooth(0.0) * X.cos() * ALONG


def test_of_a_smooth_function() -> None:
    found = differences.central(smooth)
    assert differences.compare("JVP", exact(), found).verdict == "right"
    assert (found.value - exact()).norm() <= found.uncertainty.norm()


@pytest.mark.parametrize("error", [1e-5, 1e-3, 1.0, math.nan, math.inf])
def test_an_error_is_wrong_and_measured(error: float) -> None:
    found = differences.compare("JVP", exact() * (1 + error), differences.central(smooth))
    assert found.verdict == "wrong"
    assert math.isfinite(error) != (not math.isfinite(found.off))
    assert not math.isfinite(error) or found.off == pytest.approx(error, rel=found.uncertainty / error)


def test_of_a_function_in_float32() -> None:
    found = differences.central(lambda step: smooth(step).float().double())
    judged = [differences.compare("JVP", exact() * factor, found) for factor in (1.0, 1.01)]
    assert [one.verdict for one in judged] == ["right", "wrong"]


def test_of_a_constant() -> None:
    found = differences.central(lambda _: X)
    assert differences.compare("JVP", torch.zeros_like(X), found).verdict == "right"
    assert differences.compare("JVP", X, found).verdict == "wrong"


def test_noise_is_undecided() -> None:
    noisy = differences.central(lambda _: torch.randn(7, dtype=torch.float64))
    assert differences.compare("JVP", X, noisy).verdict == "undecided"
    broken = differences.central(lambda _: torch.full((7,), math.nan, dtype=torch.float64))
    assert differences.compare("JVP", X, broken).verdict == "undecided"
