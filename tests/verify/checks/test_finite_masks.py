"""The oracle of finite full masks, whose scores are rounded once, and its budget, which sees what that leaves."""

from dataclasses import replace

import pytest
import torch

from verify.budget import tolerance
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import Subject, dense64, with_rounded_scores

CASE = Case("gqa", q_heads=4, kv_heads=2, m=9, n=12, d=16, dv=8)
NUMBERS = (torch.finfo(torch.float32).min, -1e9, 3e38)


def swallowed(number: float) -> Inputs:
    """A call with a mask of one number, next to which its scores round away."""
    return replace(make_inputs(CASE, torch.float32), mask=torch.full((CASE.m, CASE.n), number))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bias_that_swallows_the_scores_gives_the_mean_of_v(number: float) -> None:
    inputs = swallowed(number)
    exact = dense64(with_rounded_scores(inputs))
    mean = inputs.v.double().mean(-2, keepdim=True).repeat_interleave(2, dim=-3)
    torch.testing.assert_close(exact.o, mean.expand_as(exact.o))
    assert not torch.allclose(exact.o, dense64(replace(inputs, mask=None)).o)


def test_small_biases_are_as_in_float64() -> None:
    inputs = make_inputs(replace(CASE, mask="additive"), torch.float64)
    identities = tolerance.same_results(dense64(with_rounded_scores(inputs)), dense64(inputs), inputs, inputs)
    assert [identity for identity in identities if not identity.ok] == []


def test_probabilities_that_are_too_large_are_seen() -> None:
    inputs = swallowed(-1e9)
    results = Subject("reference").results(inputs)
    found = tolerance.same_as_rounded_scores(replace(results, d_v=CASE.n * results.d_v), inputs)
    assert [identity.quantity for identity in found if not identity.ok] == ["d_v"]
