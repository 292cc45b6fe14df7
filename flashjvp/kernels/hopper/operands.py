"""The descriptors of a backward kernel's tensors: what a program keeps, what it streams, and what it writes.

Each is a flat tuple with the chunks of a tensor side by side (chunks.py). A `_rest` is a tensor's second chunk, if it
has one. Tensors of tangents count with JVP alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .chunks import chunks
from .pairs import are_pairs


@gluon.jit
def query_operands(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest,
    d_q, d_q_rest, d_q_t, d_q_t_rest, JVP: gl.constexpr,
):  # fmt: skip
    """Those of d_q and d_q_t. Keys and values stand in the order of pairs where descriptors make them pairs."""
    resident = chunks(q, q_rest) + chunks(G, G_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(d_q, d_q_rest)
    if JVP:
        resident = resident + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(d_q_t, d_q_t_rest)
    if are_pairs(resident, streamed):
        streamed = (k, k_t, v, v_t)  # mutate: streamed
    return resident, streamed, outs


@gluon.jit
def key_operands(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest,
    JVP: gl.constexpr, WITH_DV: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Those of d_k and d_k_t, and WITH_DV of d_v and d_v_t. With PAIRS, at a head dim of 64, queries stand in the order
    of pairs (backward_key_pairs.py)."""
    resident = chunks(k, k_rest) + chunks(v, v_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest)
    outs = chunks(d_k, d_k_rest)
    if WITH_DV:
        outs = outs + chunks(d_v, d_v_rest)
    if JVP:
        resident = resident + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        streamed = streamed + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        outs = outs + chunks(d_k_t, d_k_t_rest)
        if WITH_DV:
            outs = outs + chunks(d_v_t, d_v_t_rest)
    if PAIRS:
        streamed = (q, q_t, T, G)  # mutate: streamed (2)
    return resident, streamed, outs
