"""DTensors: each process's part of a call whose tensors are sharded on batch dims, heads or rows, and what it gives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from ..layout import empty_rows
from .sharding import Sharding

Maybe = Tensor | None
NAMES = ("q", "k", "v", "q_t", "k_t", "v_t")


class LocalCall(NamedTuple):
    """A process's tensors, how rows are divided, and what its result is a part of."""

    tensors: Any
    sharding: Sharding
    q: Any
    width: int

    def whole(self, o: Tensor) -> Tensor:
        """The DTensor of which o is this process's part, with q's placements."""
        like = torch.empty_strided(self.q.shape, self.q.stride(), dtype=self.q.dtype, device="meta")
        shape = empty_rows(like, self.width)
        found: Tensor = DTensor.from_local(
            o, self.q.device_mesh, self.q.placements, run_check=False, shape=shape.shape, stride=shape.stride()
        )
        return found


def local(tensors: Sequence[Any], sharding: object, mask: object) -> LocalCall | None:
    """This process's part of a call with DTensors, or None where there is none among the tensors."""
    given = [(name, x) for name, x in zip(NAMES, tensors, strict=False) if x is not None]
    if not any(isinstance(x, DTensor) for _, x in [*given, ("attn_mask", mask)]):
        return None
    _check_kinds(given, sharding, mask)
    q, k, v = tensors[:3]
    rows = [dim for dim, placement in enumerate(q.placements) if _dim(placement, q) == q.ndim - 2]
    heads = [dim for dim, placement in enumerate(q.placements) if _dim(placement, q) == q.ndim - 3]
    if len(rows) > 1:
        raise UnsupportedError(f"q: expected rows sharded over one dim of the mesh, got placements {q.placements}")
    for name, x in given[1:3]:
        if x.ndim != q.ndim or (heads and not _heads_fit(q, x)):
            expected = f"dims, and heads over {q.placements}, that fit q of shape {list(q.shape)}"
            raise UnsupportedError(f"{name}: expected {expected}, got shape {list(x.shape)}")
    ring = q.device_mesh.get_group(rows[0]) if rows else None
    of_rows = Sharding(q.shape[-2], ring=ring, key_length=k.shape[-2])
    return LocalCall([x if x is None else x.to_local() for x in tensors], of_rows, q, v.shape[-1])


def _check_kinds(given: Sequence[tuple[str, Any]], sharding: object, mask: object) -> None:
    """Every one of the tensors is a DTensor of the first one's mesh and placements, which are served."""
    if mask is not None:
        raise UnsupportedError("attn_mask: expected none with DTensors, got one")
    if sharding is not None:
        raise ArgumentValueError("sharding: expected None with DTensors, whose placements say it, got one")
    _, q = given[0]
    for name, x in given:
        if not isinstance(x, DTensor):
            raise ArgumentTypeError(f"{name}: expected a DTensor, as others are, got a {type(x).__name__}")
        if x.device_mesh != q.device_mesh or x.placements != q.placements:
            expected = f"the mesh and placements of q, {q.placements}"
            raise UnsupportedError(f"{name}: expected {expected}, got {x.placements} on {x.device_mesh}")
    for placement in q.placements:
        is_plain = type(placement) is Shard or isinstance(placement, Replicate)
        if not is_plain or _dim(placement, q) == q.ndim - 1:
            expected = "shards of batch dims, heads or rows, or replicas"
            raise UnsupportedError(f"q: expected {expected}, got placements {q.placements}")


def _dim(placement: Any, x: Tensor) -> int | None:
    return placement.dim % x.ndim if type(placement) is Shard else None


def _heads_fit(q: Any, x: Any) -> bool:
    """Whether each process has the key heads of its query heads: as many, or a number that the mesh divides."""
    processes = math.prod(
        q.device_mesh.size(dim) for dim, placement in enumerate(q.placements) if _dim(placement, q) == q.ndim - 3
    )
    return q.shape[-3] == x.shape[-3] or (q.shape[-3] % processes == 0 and x.shape[-3] % processes == 0)
