"""A program that makes 60 random calls of one kind for a GPU that is not there, and prints how often each kernel would
be compiled. Nothing is: a kernel that a call asks for is known from then on.

`python -m tests.flashjvp.kernels.random_calls sm_86 learned 0`: architecture, kind, seed.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from flashjvp.backends import triton, triton_varlen
from flashjvp.backends.patterns import Band, Listed
from flashjvp.kernels.launch import compilation, schedule
from flashjvp.layout import empty_lse
from verify.codegen.worker import META, Driver

WIDTH, DTYPE, CALLS = 64, torch.bfloat16, 60


def rows(chance: random.Random, batch: int | None, heads: int, length: int) -> Tensor:
    """[batch, heads, length, WIDTH], or without a batch dim, in memory that is laid out anyhow."""
    apart = chance.choice((WIDTH, WIDTH + 8, 3 * WIDTH))
    shape = (batch or 1, length, heads, apart) if chance.random() < 0.5 else (batch or 1, heads, length, apart)
    x = torch.empty(shape, dtype=DTYPE, device=META)[..., :WIDTH]
    x = x.transpose(1, 2) if shape[1] == length else x
    if batch is None:
        return x[0]
    return x[:1].expand_as(x) if chance.random() < 0.2 else x


def mask_of(chance: random.Random, kind: str, q: Tensor, keys: int) -> Tensor | None:
    """A mask of q's rank; a learned one is for all heads and batch entries, and so are its gradients. Or what comes in
    its place, of any length: the plan of a block mask, or the cumulated lengths of sequences."""
    if kind == "blocks":
        return torch.empty(chance.randint(20, 1 << 16), dtype=torch.int32, device=META)
    if kind == "packed":
        return torch.empty(2, chance.randint(1, 300), dtype=torch.int32, device=META)
    if kind not in ("bool", "additive", "learned"):
        return None
    dtype = torch.bool if kind == "bool" else DTYPE
    *outer, queries, _ = q.shape
    shape = [1 if kind == "learned" else chance.choice((1, size)) for size in outer]
    return torch.empty(*shape, queries, keys, dtype=dtype, device=META)


def pattern_of(chance: random.Random, kind: str, queries: int, keys: int) -> tuple[Band | Listed, ...]:
    """What is seen beside a mask, if anything says so."""
    if kind == "window":
        return (Band(-chance.randint(0, queries), chance.choice((-1, 0, 1, chance.randint(0, keys)))),)
    return (Listed(),) if kind == "blocks" else ()


def calls(chance: random.Random, kind: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Forward and backward of one call."""
    kernels: Any = triton_varlen if kind == "packed" else triton
    group = chance.randint(2, 8) if kind == "grouped" else 1
    batch, heads = chance.choice((None, 1, 3)), chance.randint(1, 6)
    queries, keys = (chance.choice((2, 100, 4096)) + chance.choice((0, 14, 44, 63)) for _ in "mn")
    q, q_t, o, o_t, d_o, d_o_t = (rows(chance, batch, heads * group, queries) for _ in range(6))
    k, v, k_t, v_t = (rows(chance, batch, heads, keys) for _ in range(4))
    mask = mask_of(chance, kind, q, keys)
    if kind == "packed":  # those functions take rows before heads
        q, q_t, o, o_t, d_o, d_o_t = (x.transpose(-2, -3) for x in (q, q_t, o, o_t, d_o, d_o_t))
        k, v, k_t, v_t = (x.transpose(-2, -3) for x in (k, v, k_t, v_t))
    learned = kind == "learned" and mask is not None
    mask_t = torch.empty_like(mask) if learned else None
    seed = torch.empty((), dtype=torch.int64, device=META) if kind == "dropout" else None
    options = False, chance.random(), chance.random() if kind == "dropout" else 0.0
    masks, pattern = (mask, mask_t, seed), pattern_of(chance, kind, queries, keys)
    yield kernels.forward_jvp, (q, k, v, q_t, k_t, v_t, *masks, *options, *pattern)
    statistics = o, o_t, empty_lse(q, mask), torch.empty(q.shape[:-1], device=META)
    wanted = (*(True,) * 6, learned, learned)
    yield kernels.backward_jvp, (d_o, d_o_t, q, k, v, q_t, k_t, v_t, *statistics, *masks, *options, wanted, *pattern)


def main() -> None:
    architecture, kind, seed = sys.argv[1:]
    driver.set_active(Driver(architecture))
    schedule.ARCHITECTURES[META] = architecture
    chance, compiled = random.Random(int(seed)), Counter[str]()
    for _ in range(CALLS):
        for function, args in calls(chance, kind):
            for wanted in compilation.kernels_of(function, *args):
                wanted.keep(object())
                where = wanted.kernel.fn.__module__.removeprefix("flashjvp.kernels.")
                compiled[f"{where}.{wanted.kernel.fn.__name__}"] += 1
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
