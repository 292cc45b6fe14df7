"""What is rounded besides where a sequence is divided over processes: partial results, before they are put together.

Each process calls attention on blocks of queries and keys (flashjvp/distributed/ring.py), and every call stores its
results in the input type. Outputs are merged in float32 by MATH.md (8), gradients of queries are summed in float32.
Gradients of keys are sent to their owner in the input type: the sum of a process's blocks is rounded once more. Where
processes of Ulysses share a key head, so is the sum of each. With e(x) the error of storing x, and of block b the
outputs o_b and o_t_b, the mean mu_b of S_t, the sum w_b of P over its keys, and its terms d_b of a gradient,

    e(o)   = sum_b w_b e(o_b)
    e(o_t) = sum_b w_b (e(o_t_b) + (mu_b - mu) e(o_b))      (since sum_b w_b (mu_b - mu) = 0, e(o) drops out)
    e(d)   = sum_b e(d_b) + the errors of the sums that are sent

Variances add, as in propagation.py, which knows all else that is rounded. A sum of one term is that term: it is of the
input type already, and rounding it again changes nothing. What storing the final result costs is there, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..oracles.attention import QUERY_SIDE
from .arithmetic import Arithmetic
from .propagation import StreamingKernel


class Block(NamedTuple):
    """One call of attention: some query heads, rows of the queries and rows of the keys of a sequence.

    Process (`ulysses`, `rank`) of Ulysses and ring makes it, and (`ulysses`, `owner`) holds the keys.
    """

    heads: range
    rows: Sequence[int]
    keys: Sequence[int]
    ulysses: int
    rank: int
    owner: int


class _Sum(NamedTuple):
    """A partial sum, and the variance that storing its terms, and theirs, gave it."""

    value: Tensor
    variance: Tensor


def outputs(kernel: StreamingKernel, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Variances of o and o_t from storing those of blocks."""
    o, o_t = (torch.zeros_like(x) for x in (kernel.O, kernel.O_t))
    several = _several([_of_block(kernel.P, block).sum(-1, keepdim=True) for block in blocks])
    for block in blocks:
        P = _of_block(kernel.P, block)
        w = P.sum(-1, keepdim=True)
        P = (P / w).nan_to_num(0.0)
        shift = (P * kernel.z).sum(-1, keepdim=True)  # mu_b - mu
        o_b, o_t_b = P @ kernel.v, (P * (kernel.z - shift)) @ kernel.v + P @ kernel.v_t
        stored, stored_t = kernel.type.stored(o_b), kernel.type.stored(o_t_b)
        o += several * w.square() * stored
        o_t += several * w.square() * (stored_t + shift.square() * stored)
    return o, o_t


def gradients(kernel: StreamingKernel, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Variances of the gradients from storing those of blocks, and sums of them."""
    terms = [_terms(kernel, block) for block in blocks]
    found = {}
    for name in terms[0]:
        of_blocks = [_Sum(x[name], torch.zeros_like(x[name])) for x in terms]
        total = _summed(of_blocks, kernel.type) if name in QUERY_SIDE else _sent(blocks, of_blocks, kernel.type)
        found[name] = total.variance
    return found


def _sent(blocks: Sequence[Block], terms: Sequence[_Sum], of: Arithmetic) -> _Sum:
    """The sum of what blocks add to a gradient of keys, in the order in which it is stored and sent."""
    of_ulysses = []
    for ulysses in sorted({block.ulysses for block in blocks}):
        here = [(block, x) for block, x in zip(blocks, terms, strict=True) if block.ulysses == ulysses]
        parts = [x for block, x in here if block.owner == block.rank]
        for rank in sorted({block.rank for block, _ in here}):
            if away := [x for block, x in here if block.rank == rank != block.owner]:
                parts.append(_summed(away, of))
        of_ulysses.append(_summed(parts, of))
    return _summed(of_ulysses, of)


def _summed(terms: Sequence[_Sum], of: Arithmetic) -> _Sum:
    """The sum of stored terms, which is not stored itself."""
    several = _several([x.value for x in terms])
    variances = [x.variance + several * of.stored(x.value) for x in terms]
    return _Sum(torch.stack([x.value for x in terms]).sum(0), torch.stack(variances).sum(0))


def _several(terms: Sequence[Tensor]) -> Tensor:
    """Where more than one of the terms is not zero: 1, and 0 elsewhere."""
    return ((torch.stack([*terms]) != 0).sum(0) > 1).double()


def _of_block(x: Tensor, block: Block) -> Tensor:
    """x [..., Hq, M, N] where the block is, and zeros elsewhere."""
    inside = torch.zeros(x.shape[-3:], dtype=torch.bool, device=x.device)
    rows = torch.tensor(block.rows, dtype=torch.int64, device=x.device)[:, None]
    inside[block.heads.start : block.heads.stop, rows, block.keys] = True
    return torch.where(inside, x, 0.0)


def _terms(kernel: StreamingKernel, block: Block) -> dict[str, Tensor]:
    """The terms of (15) to (20) that a block has."""
    c, fold = kernel.c, kernel.fold
    P, Pz, dS, dS_t = (_of_block(x, block) for x in (kernel.P, kernel.P * kernel.z, kernel.dS, kernel.dS_t))
    of_queries = {"d_q": c * (dS @ kernel.k + dS_t @ kernel.k_t), "d_q_t": c * (dS_t @ kernel.k)}
    P, Pz, dS, dS_t = (fold(x).mT for x in (P, Pz, dS, dS_t))
    q, q_t, G, T = (fold(x) for x in (kernel.q, kernel.q_t, kernel.G, kernel.T))
    return of_queries | {
        "d_k": c * (dS @ q + dS_t @ q_t), "d_k_t": c * (dS_t @ q), "d_v": P @ G + Pz @ T, "d_v_t": P @ T
    }  # fmt: skip
