"""What ranks do in the tests: each function takes a group of processes and gives whole results, the same on every rank.

Numbers come from a seed, so every rank, and the test, has the same whole tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import jvp

import flashjvp
from flashjvp.distributed import Sharding, attention, attention_jvp

OF_KEYS = (False, True, True, False, True, True)  # q, k, v and their tangents


@dataclass(frozen=True)
class Call:
    """The shapes and options of a call."""

    queries: int = 13
    keys: int = 11
    heads: int = 4
    kv_heads: int = 2
    is_causal: bool = False
    zigzag: bool = False
    dtype: torch.dtype = torch.float64

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """q, k, v and their tangents; the cotangents of o and o_t."""
        generator = torch.Generator().manual_seed(0)
        rows = [(self.heads, self.queries, 6), (self.kv_heads, self.keys, 6), (self.kv_heads, self.keys, 5)]

        def normal(heads: int, length: int, width: int) -> Tensor:
            return torch.randn(2, heads, length, width, dtype=torch.float64, generator=generator).to(self.dtype)

        return [normal(*x) for x in rows * 2], [normal(self.heads, self.queries, 5) for _ in range(2)]

    def sharding(self, ring: Any = None, ulysses: Any = None) -> Sharding:
        return Sharding(self.queries, ring=ring, ulysses=ulysses, key_length=self.keys, zigzag=self.zigzag)

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "enable_gqa": self.heads != self.kv_heads}


def whole(call: Call) -> list[Tensor]:
    """o, o_t and the six gradients in one process."""
    tensors, (G, T) = call.tensors()
    leaves = [x.requires_grad_() for x in tensors]
    o, o_t = flashjvp.attention_jvp(*leaves, **call.options, backend="reference")
    return [o.detach(), o_t.detach(), *torch.autograd.grad([o, o_t], leaves, [G, T])]


Function = Callable[..., tuple[Tensor, Tensor]]


def divided(call: Call, sharding: Sharding, function: Function | None = None) -> list[Tensor]:
    """The same of a sequence that is divided, put together again. `function` takes leaves and sharding."""
    tensors, (G, T) = call.tensors()
    leaves = [sharding.shard(x, -2, keys).clone().requires_grad_() for x, keys in zip(tensors, OF_KEYS, strict=True)]
    cotangents = [sharding.shard(x, -2) for x in (G, T)]
    o, o_t = (function or explicit)(leaves, sharding, call)
    grads = torch.autograd.grad([o, o_t], leaves, cotangents)
    found = [(o, False), (o_t, False), *zip(grads, OF_KEYS, strict=True)]
    return [sharding.unshard(x.detach(), -2, keys) for x, keys in found]


def explicit(leaves: list[Tensor], sharding: Sharding, call: Call) -> tuple[Tensor, Tensor]:
    return attention_jvp(*leaves, sharding, **call.options)


def by_func_jvp(leaves: list[Tensor], sharding: Sharding, call: Call) -> tuple[Tensor, Tensor]:
    o, o_t = jvp(lambda *x: attention(*x, sharding, **call.options), tuple(leaves[:3]), tuple(leaves[3:]))
    return o, o_t


def by_dual_level(leaves: list[Tensor], sharding: Sharding, call: Call) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x_t) for x, x_t in zip(leaves[:3], leaves[3:], strict=True)]
        o, o_t = forward_ad.unpack_dual(attention(*duals, sharding, **call.options))
        assert o_t is not None
        return o, o_t


def compiled(leaves: list[Tensor], sharding: Sharding, call: Call) -> tuple[Tensor, Tensor]:
    """The call between others, in one graph."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, o_t = attention_jvp(*[2 * y for y in x], sharding, **call.options, scale=0.25 * 6**-0.5)
        return o / 2, o_t / 2

    return run(*leaves)


def checkpointed(leaves: list[Tensor], sharding: Sharding, call: Call) -> tuple[Tensor, Tensor]:
    o, o_t = torch.utils.checkpoint.checkpoint(
        lambda *x: attention_jvp(*x, sharding, **call.options), *leaves, use_reentrant=False
    )
    return o, o_t


def ring(group: dist.ProcessGroup, call: Call, function: Function = explicit) -> list[Tensor]:
    return divided(call, call.sharding(ring=group), function)


def ulysses(group: dist.ProcessGroup, call: Call, function: Function = explicit) -> list[Tensor]:
    return divided(call, call.sharding(ulysses=group), function)


def mixed(_: dist.ProcessGroup, call: Call, function: Function = explicit) -> list[Tensor]:
    """On a two-dimensional mesh of all four processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    return divided(call, call.sharding(ring=mesh["ring"], ulysses=mesh["ulysses"]), function)


def plain(group: dist.ProcessGroup, call: Call) -> list[Tensor]:
    """o of attention without tangents, and its gradients."""
    sharding = call.sharding(ring=group)
    tensors, (G, _) = call.tensors()
    q, k, v = (sharding.shard(x, -2, keys).requires_grad_() for x, keys in zip(tensors[:3], OF_KEYS, strict=False))
    o = attention(q, k, v, sharding, **call.options)
    found = [o, *torch.autograd.grad(o, (q, k, v), sharding.shard(G, -2))]
    return [sharding.unshard(x.detach(), -2, keys) for x, keys in zip(found, (False, *OF_KEYS[:3]), strict=True)]


def of_dtensors(group: dist.ProcessGroup, call: Call, dims: tuple[int | None, ...]) -> list[Tensor]:
    """o, o_t and gradients of DTensors that are sharded over a mesh of dims; None = replicated."""
    size = dist.get_world_size(group)
    shape = (size,) if len(dims) == 1 else (2, size // 2)
    mesh = DeviceMesh.from_group(group, "cpu") if len(dims) == 1 else init_device_mesh("cpu", shape)
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    tensors, cotangents = call.tensors()
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for x in tensors]
    o, o_t = attention_jvp(*leaves, **call.options)
    G, T = (distribute_tensor(x, mesh, placements) for x in cotangents)
    grads = torch.autograd.grad([o, o_t], leaves, [G, T])
    for x, like in zip((o, o_t, *grads), (leaves[0], leaves[0], *leaves), strict=True):
        assert isinstance(x, DTensor) and x.placements == like.placements and x.device_mesh == mesh
    return [x.full_tensor().detach() for x in (o, o_t, *grads)]


def tangents_of_all_rows(group: dist.ProcessGroup) -> list[Tensor]:
    """The tangents of what `unshard` gives, by both kinds of forward mode."""
    sharding = Sharding(7, ring=group, zigzag=True)
    x = sharding.shard(torch.arange(7.0), 0)
    with forward_ad.dual_level():
        _, dual = forward_ad.unpack_dual(sharding.unshard(forward_ad.make_dual(x, 2 * x), 0))
    return [jvp(lambda x: sharding.unshard(x, 0), (x,), (2 * x,))[1], dual]
