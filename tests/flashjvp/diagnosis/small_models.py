"""Small modules, each with one thing that a JVP has trouble with, for the tests of `flashjvp.check`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class WithoutJvp(torch.autograd.Function):
    """Twice its input, by a backward alone."""

    @staticmethod
    def forward(x):  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 2 * grad


class WrongJvp(WithoutJvp):
    """Its JVP is that of the input itself."""

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return tangent.clone()


class RightJvp(WithoutJvp):
    """Its JVP is what it should be."""

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return 2 * tangent


class Within(nn.Module):
    """A layer, then a step, then a layer: `step(self, y)` is what a test is about."""

    def __init__(self, step: Callable[["Within", Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Module() if norm is None else norm
        self.other = nn.Linear(WIDTH, WIDTH)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.step(self, torch.sin(self.before(x))))


class Attention(nn.Module):
    """Attention that is written out; `fused_attn` chooses, as in timm."""

    def __init__(self, fused_attn: bool | None = None) -> None:
        super().__init__()
        if fused_attn is not None:
            self.fused_attn = fused_attn
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        if getattr(self, "fused_attn", False):
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (torch.einsum("bhmd,bhnd->bhmn", q, k) * 0.5).softmax(-1)
            o = torch.einsum("bhmn,bhnd->bhmd", F.dropout(weights, 0.1, self.training), v)
        return o.transpose(1, 2).flatten(2)


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def without_gradient(self: Within, y: Tensor) -> Tensor:
    with torch.no_grad():
        return y + self.other(y)


def of_torch(self: Within, y: Tensor) -> Tensor:
    heads = y.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def stretched(y: Tensor) -> Tensor:
    return torch.cat([y, y], -1)


def mha(**options: bool) -> Callable[[Within, Tensor], Tensor]:
    return lambda self, y: self.inner(y, y, y, **options)[0]


def inner(self: Within, y: Tensor) -> Tensor:
    return self.inner(y)


def channels_first(self: Within, y: Tensor) -> Tensor:
    return self.inner(y.transpose(1, 2)).transpose(1, 2)


def channels_last(self: Within, y: Tensor) -> Tensor:
    """As an image [B, C, H, W] whose channels lie closest in memory."""
    return self.inner(y.unflatten(-1, (2, 4)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(-2)


def checkpointed(use_reentrant: bool) -> Callable[[Within, Tensor], Tensor]:
    return lambda self, y: checkpoint(lambda z: torch.sin(self.other(z)), y, use_reentrant=use_reentrant)


def linear_attention(self: Within, y: Tensor) -> Tensor:
    """No matrix of scores: softmax of keys over the sequence, of queries over features."""
    return y.softmax(-1) @ (self.other(y).softmax(1).transpose(1, 2) @ y)


def written_into_place(self: Within, y: Tensor) -> Tensor:
    """In place, but of a tensor that is made under the JVP: that keeps its tangent."""
    shifted = torch.zeros_like(y)
    shifted[:, 1:] = y[:, :-1]
    return shifted + y
