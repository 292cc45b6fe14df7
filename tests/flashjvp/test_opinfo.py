"""PyTorch's own samples for scaled_dot_product_attention, those without dropout: attention is a drop-in for them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flashjvp
from verify.budget.tolerance import budget
from verify.cases.inputs import Inputs
from verify.oracles.attention import Backend, Results, dense64, dense_same_type

common = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="PyTorch's own test helpers")
BACKENDS = ("reference", "tiled", "triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")


class Sample(NamedTuple):
    """Arguments of a call; the mask among the options needs no gradient here."""

    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Sample":
        tensors = tuple(x.detach().to(dtype).requires_grad_() for x in self.tensors)
        options = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Sample(tensors, options)  # type: ignore[arg-type]


def samples() -> Iterator[Sample]:
    (info,) = [op for op in common.op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        if sample.kwargs.get("dropout_p", 0.0) == 0.0:
            options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in sample.kwargs.items()}
            yield Sample((sample.input, *sample.args), options)


SAMPLES = list(samples())


def as_inputs(sample: Sample) -> Inputs:
    """The call with batch dims written out, and with tangents and cotangents."""
    q, k, v = (x.detach() for x in sample.tensors)
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    mask, is_causal = sample.options.get("attn_mask"), sample.options.get("is_causal", False)
    tangents = [torch.cos(3 * x) for x in (q, k, v)]
    return Inputs(q, k, v, *tangents, mask, torch.randn_like(q), torch.randn_like(q), is_causal)


def differentiated(sample: Sample, inputs: Inputs, backend: Backend) -> Results:
    """Outputs, gradients in the sample's own shapes, and the tangent of a dual level."""
    leaves = [x.detach().requires_grad_() for x in sample.tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.cos(3 * x.detach())) for x in leaves]
        o, o_t = forward_ad.unpack_dual(flashjvp.attention(*duals, **sample.options, backend=backend))
    assert o_t is not None and inputs.d_o is not None and inputs.d_o_t is not None
    d_q, d_k, d_v = torch.autograd.grad((o, o_t), leaves, (inputs.d_o, inputs.d_o_t))
    return Results(o.detach(), o_t.detach(), d_q, d_k, d_v, None, None, None)


def test_there_are_samples_of_unequal_ranks_and_with_a_mask() -> None:
    assert any(q.ndim != k.ndim for (q, k, _), _ in SAMPLES)
    assert any(isinstance(options.get("attn_mask"), Tensor) for _, options in SAMPLES)


@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_values_and_derivatives_are_those_of_pytorchs(number: int, dtype: torch.dtype, backend: Backend) -> None:
    """In each type within the error budget of what PyTorch's attention gives in float64."""
    if backend == "triton" and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("triton has no float64, and its interpreter no bfloat16 products")
    sample = SAMPLES[number].to(dtype)
    inputs, wide = as_inputs(sample), sample.to(torch.float64)
    exact = dense64(inputs)
    theirs = torch.nn.functional.scaled_dot_product_attention(*wide.tensors, **wide.options)
    torch.testing.assert_close(exact.o, theirs.detach())
    budgets = budget(inputs, exact, dense_same_type(inputs))
    found = differentiated(sample, inputs, backend)
    assert found.o.dtype == dtype and found.o.shape == theirs.shape
    for name in ("o", "o_t", "d_q", "d_k", "d_v"):
        x, y = getattr(found, name), getattr(exact, name)
        copies = y.numel() // x.numel()  # that a gradient is the sum of, where ranks differ
        error = (x.double() - (y.sum(0) if copies > 1 else y)).norm().item()
        assert error <= copies**0.5 * budgets[name].frobenius * budgets[name].scale, name


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_gradcheck_with_batched_gradients_in_both_modes(number: int, backend: str) -> None:
    (q, k, v), options = SAMPLES[number].to(torch.float64)
    small = [x.detach()[..., :1, :, :2].clone().requires_grad_() for x in (q, k, v)]

    def call(*tensors: Tensor) -> Tensor:
        return flashjvp.attention(*tensors, **options, backend=backend)

    assert torch.autograd.gradcheck(
        call, small, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True
    )
