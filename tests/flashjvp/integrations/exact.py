"""Two objectives that differentiate a JVP in reverse, and the same by float64 math of PyTorch that is right.

That is dense attention (the MATH backend) and norms written out by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BAR = 1e-9  # of relative errors in norm, in float64
B, N, D = 2, 5, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    return normalised(x, tuple(range(-len(shape), 0)), weight, bias, eps)


def normalised(x: Tensor, dims: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    x = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@contextmanager
def stock_math() -> Iterator[None]:
    """PyTorch's own functions, those of them that are right."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(F, "layer_norm", layer_norm)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
        torch.backends.mha.set_fastpath_enabled(fast)


def objectives(
    model: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, jvp: Callable[..., Any] = torch.func.jvp
) -> dict[str, Tensor]:
    """u, du along (v, 1), and the gradients of a loss with du detached (MeanFlow) and of one without (TVM)."""
    v, t = normal(*x.shape, seed=7), x.new_tensor(0.3)
    u, du = jvp(model, (x, t), (v, torch.ones_like(t)))
    meanflow = (u - (v - 0.5 * du).detach()).square().mean()
    tvm = du.square().mean() + (u * du).mean()
    of_meanflow = torch.autograd.grad(meanflow, parameters, retain_graph=True, allow_unused=True)
    of_tvm = torch.autograd.grad(tvm, parameters, allow_unused=True)
    gradients = {
        f"d{name} {i}": g for name, of in (("meanflow", of_meanflow), ("tvm", of_tvm)) for i, g in enumerate(of)
    }
    return {"u": u, "du": du, **{name: g for name, g in gradients.items() if g is not None}}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error; gradients that vanish are measured on the scale of the largest one."""
    assert found.keys() == expected.keys()
    scale = max(y.norm().item() for y in expected.values())
    return max(((found[name] - y).norm() / y.norm().clamp_min(1e-6 * scale)).item() for name, y in expected.items())


class Timed(nn.Module):
    """A network of x [B, N, D] as one of (x, t)."""

    def __init__(self, network: Callable[..., Tensor], *more: Any) -> None:
        super().__init__()
        self.network, self.more = network, more

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x * torch.cos(t), *self.more)
