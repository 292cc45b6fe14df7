"""What the warp-specialised kernels do with additive masks, beyond test_hopper.py."""

from dataclasses import replace

import pytest
import torch

import flashjvp
from tests.flashjvp.kernels.test_hopper import interpreted, pipelines_in_use
from verify.budget.rounding import rounding_bounds
from verify.budget.tolerance import budget, check, same
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import with_finite_masks
from verify.emulator.gluon import emulated
from verify.oracles.attention import Subject, dense64, dense_same_type, run


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("d", [64, 128, 192])
def test_finite_masks(d: int, dtype: torch.dtype) -> None:
    """Numbers so large that the scores of a row are lost beside them."""
    case = Case("finite", batch=(1,), q_heads=2, kv_heads=1, m=138, n=150, d=d, dv=d)
    assert not [row for row in with_finite_masks(make_inputs(case, dtype), Subject("triton")) if not row.ok]


@interpreted
@pytest.mark.parametrize("d", [64, 72, 128, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_an_additive_mask_hides_or_has_beside_it_is_not_seen(dtype: torch.dtype, d: int) -> None:
    """NaN where keys come after the query, and in memory between rows and heads."""
    case = Case("nan", batch=(1,), q_heads=2, kv_heads=1, m=150, n=170, d=d, dv=d, is_causal=True)
    inputs = make_inputs(case, dtype)
    around = torch.full((3, 190, 200), torch.nan, dtype=dtype)
    bias = around[1:, 3:153, 7:177]
    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    seen = bias.tril().clone()
    bias.masked_fill_(torch.ones(bias.shape, dtype=torch.bool).triu(1), torch.nan)
    without_nan = replace(inputs, mask=seen)
    exact = dense64(without_nan)
    budgets = budget(without_nan, exact, dense_same_type(without_nan))
    with emulated(), pipelines_in_use(False) as launched:
        results = run(replace(inputs, mask=bias), "triton")
    assert "forward" in launched
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@interpreted
def test_the_gradient_of_an_additive_mask_comes_beside_the_others() -> None:
    """From a portable kernel, which a tangent of the mask keeps for all gradients."""
    inputs = make_inputs(Case("learned", batch=(2,), q_heads=2, kv_heads=1, m=70, n=90, d=64, dv=64), torch.float32)
    bias = torch.randn(2, 70, 90, generator=torch.Generator().manual_seed(0))

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        given = (inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t, bias)
        leaves = [x.detach().requires_grad_() for x in given if x is not None]
        outputs = flashjvp.attention_jvp(*leaves, enable_gqa=True, backend=backend)  # type: ignore[arg-type, misc]
        return torch.autograd.grad(outputs, leaves, [inputs.d_o, inputs.d_o_t])

    with emulated(), pipelines_in_use(True) as launched:
        found = gradients("triton")
    assert set(launched) == {"forward", "backward_key", "backward_query"}
    bounds = rounding_bounds(replace(inputs, mask=bias))
    names = ("d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t", "d_mask")
    for name, x, y in zip(names, found, gradients("reference"), strict=True):
        bound = bounds[
            "d_k" if name == "d_mask" else name
        ].whole  # both are sums of dS, of which d_mask has factors of 1
        assert same(name, x, y, 2 * bound).ok
