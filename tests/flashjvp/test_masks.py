"""Masks that are more than a choice of keys: biases of any size, PyTorch's causal biases, subclasses, gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import Backend, dense64, dense_same_type, run

BACKENDS = ("reference", "tiled", "triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")
MOST = torch.finfo(torch.float32).max
FULL_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "finfo.min": lambda row: row.fill_(-MOST),
    "-1e9": lambda row: row.fill_(-1e9),
    "-1e4": lambda row: row.fill_(-1e4),
    "large": lambda row: row.fill_(3e38),
    "two sizes": lambda row: row.fill_(-MOST)[::2].fill_(-3e38),
    "but for one key": lambda row: row.fill_(-MOST)[3:4].fill_(0.0),
    "infinite but for one key": lambda row: row.fill_(-torch.inf)[3:4].fill_(-1e9),
}


def with_small_bias(inputs: Inputs) -> Inputs:
    """A call that has the same scores, up to a number a row, by a bias of their size.

    Dense attention rounds c * q @ k.T + bias, in float32 for half types, and whatever that leaves is what o means.
    """
    wide = inputs.q.dtype if inputs.q.dtype == torch.float64 else torch.float32
    assert inputs.mask is not None
    products = inputs.c * (inputs.q.to(wide) @ inputs.k.to(wide).mT)
    S = products + inputs.mask
    seen = torch.ones(S.shape[-2:], dtype=torch.bool).tril() if inputs.is_causal else torch.tensor(True)
    m = S.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    left = (S - m).masked_fill(m.isneginf(), -torch.inf)
    return replace(inputs, mask=left.where(left > -1e4, -torch.inf) - products)


@pytest.mark.sampled(of=3)
@interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("row", FULL_ROWS)
def test_a_row_of_any_bias_has_the_gradients_of_its_o(
    row: str, is_causal: bool, dtype: torch.dtype, backend: Backend
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    case = Case("full_rows", (1,), 2, 2, m=16, n=16, d=8, dv=8, is_causal=is_causal)
    inputs = replace(make_inputs(case, dtype), mask=torch.zeros(16, 16))
    assert inputs.mask is not None
    FULL_ROWS[row](inputs.mask[9])
    small = with_small_bias(inputs)
    exact = dense64(small)
    verdicts = check(run(inputs, backend), exact, budget(small, exact, dense_same_type(small)))
    assert not [verdict for verdict in verdicts if not verdict.ok]


def test_the_mean_of_v_where_a_bias_swallows_the_scores() -> None:
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8, requires_grad=True)
    mask = torch.zeros(2, 16)
    mask[1] = torch.finfo(torch.float32).min
    for backend in BACKENDS[: 2 if torch.cuda.is_available() else 3]:
        o = flashjvp.attention(q, k, v, attn_mask=mask, backend=backend)
        (d_v,) = torch.autograd.grad(o[..., 1, :].sum(), v)
        torch.testing.assert_close(d_v, torch.full_like(d_v, 1 / 16))
        torch.testing.assert_close(o[0, 0, 1], v[0, 0].mean(0))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (5, 5)])
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_causal_biases_are_what_they_mean(variant: Any, shape: tuple[int, int], backend: str) -> None:
    m, n = shape
    diagonal = 0 if variant is causal_upper_left else n - m
    mask = torch.ones(m, n, dtype=torch.bool).tril(diagonal)
    q, k, v, q_t = torch.randn(2, 3, m, 8), *torch.randn(2, 2, 3, n, 8), torch.randn(2, 3, m, 8)
    for _ in range(3):
        assert torch.equal(
            flashjvp.attention(q, k, v, variant(m, n), backend=backend),
            flashjvp.attention(q, k, v, mask, backend=backend),
        )
        actual = flashjvp.attention_jvp(q, k, v, q_t, attn_mask=variant(m, n), backend=backend)
        torch.testing.assert_close(actual, flashjvp.attention_jvp(q, k, v, q_t, attn_mask=mask, backend=backend))
    both = flashjvp.attention(q, k, v, variant(m, n), is_causal=True, backend=backend)
    torch.testing.assert_close(both, flashjvp.attention(q, k, v, mask, is_causal=True, backend=backend))


def test_a_causal_bias_of_another_size() -> None:
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 6, 8)
    with pytest.raises(ArgumentValueError, match="causal bias of 3 queries and 6 keys, got one of 3 and 7"):
        flashjvp.attention(q, k, k, causal_upper_left(3, 7))
    with pytest.raises(ArgumentTypeError, match="is_causal: expected a bool"):
        flashjvp.attention(q, k, k, causal_upper_left(3, 6), is_causal=0)  # type: ignore[arg-type]


class Meaning(Tensor):
    """A subclass whose functions do something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Named(Tensor):
    """A subclass that is a tensor like any other."""


def test_other_subclasses_are_refused_by_type_or_are_what_their_memory_holds() -> None:
    q, mask = torch.randn(1, 2, 4, 8), torch.rand(4, 4) > 0.3
    expected = flashjvp.attention(q, q, q, mask)
    for _ in range(3):
        with pytest.raises(ArgumentTypeError, match=r"expected a torch\.Tensor or a causal bias .* Meaning"):
            flashjvp.attention(q, q, q, mask.as_subclass(Meaning))
        with pytest.raises(ArgumentTypeError, match=r"q: expected a torch\.Tensor, got a MaskedTensor"):
            flashjvp.attention(torch.masked.masked_tensor(q, torch.ones_like(q).bool()), q, q)
        assert torch.equal(flashjvp.attention(q, q, q, mask.as_subclass(Named)).as_subclass(Tensor), expected)
        buffer = torch.nn.Parameter(mask.float(), requires_grad=False)
        assert torch.equal(flashjvp.attention(q, q, q, buffer), flashjvp.attention(q, q, q, mask.float()))
