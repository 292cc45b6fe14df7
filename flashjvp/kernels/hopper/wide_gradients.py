"""What the kernels of d_q and of d_k at head dims above 128 share; MATH.md (1)-(6), (9)-(16), (18), (19).

One consumer computes S and S_t, the other one A and B. They exchange P, S_t - mu, dS_t and dS. Names are of the
gradient's side: `x` are the resident rows, `y` the streamed ones; for d_k these are k and q. Tiles are [x, y].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .blocks import CONSUMER_ROWS
from .chunks import add_product, add_scores, complete, left_operands
from .pipeline import accumulator
from .wide_exchange import (
    S_T,
    WEIGHTS,
    WEIGHTS_T,
    P,
    await_given,
    chunk_of,
    give,
    load_numbers,
    load_weights,
    store_numbers,
    store_weights,
)
from .wide_pipeline import await_second, release_first


@gluon.jit
def scores(inputs):
    """S / c and S_t / c of a tile, in flight."""
    x, x_t = inputs.resident[0], inputs.resident[2]
    y, y_t = inputs.second
    ROWS: gl.constexpr = y[0].shape[0]
    await_second(inputs)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, accumulator(ROWS))
    s = add_scores(zero, x, y, USE_ACC=False)
    s_t = add_scores(zero, x_t, y, USE_ACC=False)
    return s, add_scores(s_t, x, y_t)


@gluon.jit
def add_gradients_from_scores(accs, p, s_t, scale, mu, inputs, CHUNK: gl.constexpr):
    """Adds a tile to its chunk of the gradients, from P and S_t / c, which is in flight."""
    y, y_t = chunk_of(inputs.second, CHUNK)
    store_numbers(inputs, p)
    give(inputs, P)
    await_given(inputs, WEIGHTS_T)
    weights_t = load_weights(inputs, 0, y)
    acc = add_product((accs[0],), weights_t, y_t)  # mutate: acc
    acc_t = add_product((accs[1],), weights_t, y)
    s_t = warpgroup_mma_wait(2, deps=[s_t])
    store_numbers(inputs, s_t * scale - mu)
    give(inputs, S_T)
    await_given(inputs, WEIGHTS)
    acc = add_product(acc, load_weights(inputs, 1, y), y)
    return complete(acc + acc_t)


@gluon.jit
def add_gradients_from_cotangents(accs, a, b, row_a, delta, inputs, CHUNK: gl.constexpr):
    """Adds a tile to its chunk of the gradients, from A and B, which are in flight."""
    y, y_t = chunk_of(inputs.second, CHUNK)
    a, b = warpgroup_mma_wait(0, deps=[a, b])
    release_first(inputs)
    centred = a - row_a
    await_given(inputs, P)
    p = load_numbers(inputs)
    weights_t = (p * centred).to(y[0].dtype)
    store_weights(inputs, 0, weights_t)
    give(inputs, WEIGHTS_T)
    weights_t = left_operands(weights_t, y)
    acc = add_product((accs[0],), weights_t, y_t)
    acc_t = add_product((accs[1],), weights_t, y)
    await_given(inputs, S_T)
    weights = (p * (load_numbers(inputs) * centred + (b - delta))).to(y[0].dtype)  # mutate: weights
    store_weights(inputs, 1, weights)
    give(inputs, WEIGHTS)
    acc = add_product(acc, left_operands(weights, y), y)
    return complete(acc + acc_t)
