"""Callers of xformers and of flash_attn, which take [batch, length, heads, head dim] and sequences packed into one.

Neither has anything for a CPU: xformers is installed without its kernels, and a module stands in for flash_attn. So the
reference is a network with attention by its equations, on sequences one by one.
"""

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .client import Client, timed

TOKENS = (2, 6, 16)
PACKED = (3, 3)  # lengths of the sequences that a row of TOKENS is made of


def stand_in_for_flash_attn() -> types.ModuleType:
    """A module with the signatures of flash_attn 2, whose functions need a GPU."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # type: ignore[no-untyped-def] # fmt: skip
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # type: ignore[no-untyped-def] # fmt: skip
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    for function in (flash_attn_func, flash_attn_varlen_func):
        function.__module__ = "flash_attn"
        setattr(module, function.__name__, function)
    return module


def xformers_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    return xformers.ops.memory_efficient_attention(q, k, v)


def xformers_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=xformers.ops.LowerTriangularMask())


def xformers_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All sequences in one row, as dinov2 has images of two sizes."""
    from xformers.ops import fmha, memory_efficient_attention

    bias = fmha.BlockDiagonalMask.from_seqlens(PACKED * len(q))
    rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    return memory_efficient_attention(*rows, attn_bias=bias).view(q.shape)


def flash_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sys.modules["flash_attn"].flash_attn_func(q, k, v, causal=True)


def flash_bottom_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries alone: flash_attn's causal lets the last query see the last key."""
    o = sys.modules["flash_attn"].flash_attn_func(q[:, 2:], k, v, causal=True)
    return F.pad(o, (0, 0, 0, 0, 2, 0))


def flash_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = torch.tensor((0, *PACKED * len(q)), dtype=torch.int32)
    starts = lengths.cumsum(0, dtype=torch.int32)
    function = sys.modules["flash_attn"].flash_attn_varlen_func
    return function(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, max(PACKED), max(PACKED)).view(q.shape)


def equations(seen: Callable[[int], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention where query m sees key n if `seen` is True there; zero for those that see none."""
    mask = seen(q.shape[1])
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -1e30).softmax(-1)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v) * mask.any(-1).view(1, -1, 1, 1)


def every(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def earlier(n: int) -> Tensor:
    return every(n).tril()


def earlier_of_last(n: int) -> Tensor:
    return earlier(n) & (torch.arange(n) >= 2)[:, None]


def same_sequence(n: int) -> Tensor:
    return torch.block_diag(*(torch.ones(m, m) for m in PACKED)).bool()


class Block(nn.Module):
    """A layer that calls `attention`, and may be told to use the equations."""

    def __init__(self, attention: Callable[..., Tensor], seen: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.attention, self.seen, self.by_equations = attention, seen, False
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).unbind(2)
        o = equations(self.seen, q, k, v) if self.by_equations else self.attention(q, k, v)
        return x + self.out(o.flatten(2))


def _of_times(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(timed(x, t, r))


def _plain(network: nn.Module) -> None:
    network.by_equations = True


def _client(name: str, package: str, attention: Callable[..., Tensor], seen: Callable[[int], Tensor]) -> Client:
    def build() -> nn.Module:
        importlib.import_module(
            "xformers.ops" if package == "xformers" else package
        )  # before the context, as callers do
        return Block(attention, seen)

    return Client(name, package, build, _of_times, TOKENS, plain=_plain)


CLIENTS = [
    _client("xformers", "xformers", xformers_all, every),
    _client("xformers, causal", "xformers", xformers_causal, earlier),
    _client("xformers, packed", "xformers", xformers_packed, same_sequence),
    _client("flash_attn (stand-in), causal", "torch", flash_all, earlier),
    _client("flash_attn (stand-in), bottom right", "torch", flash_bottom_right, earlier_of_last),
    _client("flash_attn (stand-in), packed", "torch", flash_packed, same_sequence),
]
