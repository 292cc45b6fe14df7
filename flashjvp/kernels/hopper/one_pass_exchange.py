"""What the two consumers of backward_one_pass.py give each other through shared memory.

The first gives P and S_t - mu of a tile. Where d_q and d_q_t are accumulated, the second one puts dS and dS_t in the
place of P when it has read that. The place is free for the next tile when the second consumer says so.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .blocks import CONSUMER_ROWS
from .dq_accum import from_order, in_order, to_order
from .pipeline import make_barriers
from .triton_compat import here, reinterpret

P = gl.constexpr(0)
Z = gl.constexpr(1)  # S_t - mu
DS = gl.constexpr(0)
DS_T = gl.constexpr(1)


class Exchange(NamedTuple):
    """Tiles of [64 keys, streamed queries], of one iteration at a time."""

    tiles: Any  # dS and dS_t, or P and S_t - mu in float32, which take twice the memory
    given: Any  # P and S_t - mu are there
    ds_given: Any  # dS and dS_t are there
    free: Any  # the second consumer reads the place no more


@gluon.constexpr_function
def _bytes_of_a_number(streamed):
    *_, rows, columns = streamed.block_shape
    return streamed.block_type.nbytes // (rows * columns)


@gluon.jit
def allocate_exchange(streamed):
    """`Exchange` for streamed tiles as this descriptor has them."""
    ROWS: gl.constexpr = streamed.block_shape[-2]
    COUNT: gl.constexpr = 8 // _bytes_of_a_number(streamed)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS, 16, rank=2)
    tiles = gl.allocate_shared_memory(streamed.dtype, [COUNT, CONSUMER_ROWS, ROWS], DS_LAYOUT)
    return Exchange(tiles, make_barriers(1, 1), make_barriers(1, 1), make_barriers(1, 1))


@gluon.jit
def _numbers(exchange, which: gl.constexpr):
    """A float32 tile, in the order in which threads hold an accumulator."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COUNT: gl.constexpr = CONSUMER_ROWS * exchange.tiles.shape[2]
    return reinterpret(exchange.tiles, gl.float32, [2, COUNT], LAYOUT).index(which)


@gluon.jit
def await_free(exchange, iteration):
    """Waits until this iteration's numbers may be stored: the second consumer is through with those before it."""
    mbarrier.wait(exchange.free.index(0), (iteration & 1) ^ 1)  # mutate: mbarrier.wait (1)


@gluon.jit
def release(exchange):
    """The second consumer is through with this iteration's tiles."""
    mbarrier.arrive(exchange.free.index(0), count=1)


@gluon.jit
def store_numbers(exchange, which: gl.constexpr, x):
    _numbers(exchange, which).store(to_order(x))


@gluon.jit
def give(exchange):
    """P and S_t - mu are stored."""
    mbarrier.arrive(exchange.given.index(0), count=1)


@gluon.jit
def await_given(exchange, iteration):
    mbarrier.wait(exchange.given.index(0), iteration & 1)  # mutate: mbarrier.wait (2)


@gluon.jit
def load_numbers(exchange, which: gl.constexpr):
    ROWS: gl.constexpr = exchange.tiles.shape[2]
    return from_order(_numbers(exchange, which).load(in_order(ROWS)), ROWS)


@gluon.jit
def give_ds(exchange, ds, ds_t):
    """Stores dS and dS_t over P, which is read."""
    exchange.tiles.index(DS).store(ds)  # mutate: store
    exchange.tiles.index(DS_T).store(ds_t)
    fence_async_shared()
    mbarrier.arrive(exchange.ds_given.index(0), count=1)


@gluon.jit
def await_ds(exchange, iteration):
    mbarrier.wait(exchange.ds_given.index(0), iteration & 1)  # mutate: mbarrier.wait (3)


@gluon.jit
def ds_of_queries(exchange, which: gl.constexpr, iteration):
    """dS or dS_t as [queries, keys], at an address that is made here."""
    return exchange.tiles.index(which + (iteration >> 30) + here()).permute((1, 0))
