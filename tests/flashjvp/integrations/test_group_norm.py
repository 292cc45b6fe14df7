"""Group norm of inputs that lie in memory channels last, of which PyTorch's up to 2.13 has no tangent."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashjvp

from .exact import BAR, normal, worst


def objectives(norm: nn.Module, x: Tensor, v: Tensor, compiled: bool = False) -> dict[str, Tensor]:
    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: F.silu(norm(x)), (x,), (v,))

    u, du = (torch.compile(step, backend="aot_eager") if compiled else step)(x, v)
    gradients = torch.autograd.grad((u * du).sum(), [x, *norm.parameters()])
    return {"u": u, "du": du, **{f"d {i}": gradient for i, gradient in enumerate(gradients)}}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_channels_last(affine: bool, compiled: bool) -> None:
    norm = nn.GroupNorm(2, 4, affine=affine).double()
    for i, parameter in enumerate(norm.parameters()):
        parameter.data = normal(4, seed=i)
    x, v = (normal(2, 4, 3, 3, seed=seed) for seed in (3, 4))
    x.requires_grad_()
    expected = objectives(norm, x, v)
    x, v = (y.detach().to(memory_format=torch.channels_last) for y in (x, v))
    x.requires_grad_()
    with flashjvp.replaced() as replaced:
        found = objectives(norm, x, v, compiled)
    assert worst(found, expected) < BAR
    assert "group_norm" in {row.function for row in replaced.report().rows}
