"""Which rows a program computes, which tiles it streams, and which pairs of queries and keys are masked by position."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .triton_compat import here, where_less

CONSUMER_ROWS = gl.constexpr(64)  # resident rows of a consumer; a program has two consumers


class Block(NamedTuple):
    """The 128 resident rows of a program: those of one head from `row0` on."""

    batch: Any
    head: Any
    row0: Any


class Loop(NamedTuple):
    """What a program streams: of `heads` heads from `head` on the tiles from `first` until before `end`."""

    head: Any
    heads: Any
    first: Any
    end: Any
    query_heads: Any  # how many a sequence has


@gluon.jit
def query_block(M, N, heads, group, KEYS: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr = 2):
    """The block of a program with resident queries, and its loop over tiles of KEYS keys of one head."""
    blocks = gl.cdiv(M, CONSUMERS * CONSUMER_ROWS)
    pid = gl.program_id(0)
    number = pid % blocks
    if CAUSAL:
        number = blocks - 1 - number  # the longest loops first, so that the short ones fill the gaps at the end
    row0 = number * (CONSUMERS * CONSUMER_ROWS)
    head = (pid // blocks) % heads
    end = gl.cdiv(N, KEYS)
    if CAUSAL:
        end = gl.minimum(end, gl.cdiv(row0 + CONSUMERS * CONSUMER_ROWS, KEYS))
    # mutate: return pid blocks (1)
    return Block(pid // blocks // heads, head, row0), Loop(head // group, 1, 0, end, heads)


@gluon.jit
def key_block(M, N, heads, group, ROWS: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr = 2):
    """The block of a program with resident keys, and its loop over tiles of ROWS queries of all heads of the group."""
    blocks = gl.cdiv(N, CONSUMERS * CONSUMER_ROWS)
    kv_heads = heads // group
    pid = gl.program_id(0)
    row0 = (pid % blocks) * (CONSUMERS * CONSUMER_ROWS)
    head = (pid // blocks) % kv_heads
    end = gl.cdiv(M, ROWS)
    first = 0
    if CAUSAL:
        first = gl.minimum(row0 // ROWS, end)
    # mutate: return pid blocks (2)
    return Block(pid // blocks // kv_heads, head, row0), Loop(head * group, group, first, end, heads)


@gluon.jit
def unmasked_tiles(row, N, count, KEYS: gl.constexpr, CAUSAL: gl.constexpr):
    """How many of the first `count` tiles of keys need no masking by position, for the queries from `row` on."""
    unmasked = N // KEYS
    if CAUSAL:
        unmasked = gl.minimum(unmasked, (row + 1) // KEYS)
    return gl.minimum(unmasked, count)


@gluon.jit
def where_visible(x, other, row, tile, N, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """x [queries, keys] where the key exists and the query may see it, `other` elsewhere; queries begin at `row`."""
    KEYS: gl.constexpr = x.shape[1]
    # mutate: limit (1)
    limit = N - tile * KEYS  # columns from here on are masked
    key = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))[None, :] + here()
    if CAUSAL:
        query = row - tile * KEYS + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))
        limit = gl.minimum(query + 1, limit)[:, None]  # mutate: limit (2)
    return where_less(key, limit, x, other)


@gluon.jit
def where_causal(p, tile, program, consumer: gl.constexpr, LAYOUT: gl.constexpr):
    """P [keys, queries] where the query may see the key, 0 elsewhere.

    With an additive mask queries beyond the end see what the last one does, whose numbers they read (bias.py).
    """
    ROWS: gl.constexpr = p.shape[1]
    row0 = program.block.row0
    if tile * ROWS < row0 + 2 * CONSUMER_ROWS:
        key = row0 + consumer * CONSUMER_ROWS + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
        query = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
        if len(program.bias) > 0:
            query = gl.minimum(query, program.M - 1)
        p = gl.where(key <= query, p, 0.0)  # mutate: p (1)
    return p


@gluon.jit
def where_key_exists(p, program, consumer: gl.constexpr, LAYOUT: gl.constexpr):
    """P [keys, queries] where there is such a key, 0 elsewhere, as any mask has it by itself.

    Rows beyond the last key are copied as zeros. Their scores are 0 and their P is exp(-lse), which overflows where all
    real scores are far below 0. Their own gradients are never written, but d_q is a sum over all keys.
    """
    if program.block.row0 + 2 * CONSUMER_ROWS > program.N:
        first = program.block.row0 + consumer * CONSUMER_ROWS
        key = first + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
        p = gl.where(key < program.N, p, 0.0)  # mutate: p (2)
    return p
