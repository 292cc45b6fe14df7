"""What all Triton kernels share: addressing, loads and stores of tiles of rows, products of tiles, masks.

A tile of rows `[BLOCK, D]` is a tuple of column chunks whose widths are powers of two (72 = 64 + 16, the last one
padded), because a Triton tensor has power-of-two sides and padding 72 to 128 would waste half of every product.
`COLUMNS` is the head dim followed by the widths: (72, 64, 16). A missing operand is None in a kernel's arguments and an
empty tuple from there on, since a jit function cannot return None.

Offsets of heads and tiles are 64-bit, for tensors beyond 2^31 elements. REGULAR promises that every row starts at a
multiple of 16 bytes and that rows are less than 2^23 elements apart: loads are then wide, offsets in a tile 32-bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


def odd(size: int) -> int:
    """A size or stride as it travels inside a tuple argument.

    Triton compiles a kernel anew where an integer inside a tuple is 1 or a multiple of 16, whatever its
    `do_not_specialize` says. Odd integers from 3 on are neither, so one compilation serves every size.
    """
    return 2 * size + 3


@triton.jit
def from_odd(value):
    """The size or stride that `odd` made into `value`."""
    return (value - 3) >> 1


class Operand(NamedTuple):
    """A tensor [*batch, heads, rows, width] of unit column stride.

    Its strides are (row, head, *batch from last to first), all `odd` but the row's, which does not depend on the number
    of rows and is the one that inner loops read. Seeds of dropout have other numbers there (portable/dropout.py).
    """

    ptr: Any
    strides: tuple[int | float, ...]


@triton.jit
def select_head(x, batch, head, batch_shape, REGULAR: tl.constexpr):
    """The rows of one head as (pointer to the first, stride between them)."""
    if x is None:
        return ()
    else:
        offset = head.to(tl.int64) * from_odd(x.strides[1])
        for i in tl.static_range(len(batch_shape)):
            size = from_odd(batch_shape[i])
            offset += (batch % size).to(tl.int64) * from_odd(x.strides[2 + i])  # mutate: offset
            batch = batch // size
        ptr = x.ptr + offset
        if REGULAR:
            ptr = tl.multiple_of(ptr, 16)
        return (ptr, x.strides[0])


@triton.jit
def _chunk_pointers(x, first, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, REGULAR: tl.constexpr):
    ptr, row_stride = x
    columns = START + tl.arange(0, WIDTH)
    rows = tl.arange(0, ROWS)
    if REGULAR:
        # Unsigned, because sign extensions of the offsets and strides would take registers through whole loops.
        VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        stride = row_stride.to(tl.uint32)
        tile = tl.multiple_of(ptr + tl.cast(first, tl.uint32).to(tl.uint64) * stride, 16)
        offsets = tl.multiple_of(rows.to(tl.uint32) * stride, VECTOR)[:, None] + columns[None, :].to(tl.uint32)
    else:
        tile = ptr + tl.cast(first, tl.int64) * row_stride
        offsets = (rows.to(tl.int64) * row_stride)[:, None] + columns[None, :]
    return tile + offsets, rows, columns


@triton.jit
def _load_chunk(
    x, first, limit, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    pointers, rows, columns = _chunk_pointers(x, first, ROWS, START, WIDTH, REGULAR)
    inside = rows[:, None] < limit - first
    if START + WIDTH > D:
        inside = inside & (columns[None, :] < D)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_rows(x, first, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    """ROWS rows of one head from `first` on, as a tuple of chunks; rows from `limit` on are zeros."""
    tile = ()
    if len(x) > 0:
        for i in tl.static_range(1, len(COLUMNS)):
            tile = tile + (_load_chunk(x, first, limit, ROWS, (i - 1) * COLUMNS[1], COLUMNS[i], COLUMNS[0], REGULAR),)
    return tile


@triton.jit
def _round_to_tf32(x, PRECISION: tl.constexpr):
    """x as an operand of a product: under TF32 rounded to the nearest number of 11 significant bits.

    Tensor cores would cut the other bits off, which is twice as far off and always towards zero.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.uint32, bitcast=True)
        is_finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(is_finite, bits + 0x1000 & 0xFFFFE000, bits).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def load_operand(
    x, first, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr, PRECISION: tl.constexpr
):
    """`load_rows` of an operand of products, rounded to the input precision."""
    tile = load_rows(x, first, limit, ROWS, COLUMNS, REGULAR)
    rounded = ()
    for i in tl.static_range(len(tile)):
        rounded = rounded + (_round_to_tf32(tile[i], PRECISION),)
    return rounded


@triton.jit
def _store_chunk(
    x, chunk, first, limit, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, REGULAR: tl.constexpr
):
    pointers, rows, columns = _chunk_pointers(x, first, chunk.shape[0], START, WIDTH, REGULAR)
    keep = rows[:, None] < limit - first  # mutate: keep
    if START + WIDTH > D:
        keep = keep & (columns[None, :] < D)
    tl.store(pointers, chunk.to(x[0].dtype.element_ty), mask=keep)


@triton.jit
def store_rows(x, tile, first, limit, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    """Writes a tile's rows below `limit` from row `first` on, rounded to the type of the destination."""
    for i in tl.static_range(1, len(COLUMNS)):
        _store_chunk(x, tile[i - 1], first, limit, (i - 1) * COLUMNS[1], COLUMNS[i], COLUMNS[0], REGULAR)


@triton.jit
def _zero_chunk(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, WANTED: tl.constexpr):
    """Float32 accumulator for a tile of rows; without chunks where it is not WANTED."""
    tile = ()
    if WANTED:
        for i in tl.static_range(1, len(COLUMNS)):
            tile = tile + (_zero_chunk(ROWS, COLUMNS[i]),)
    return tile


@triton.jit
def scale_rows(tile, factor):
    """tile * factor[:, None]."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def add_scaled_rows(tile, other, factor):
    """tile + factor[:, None] * other."""
    total = ()
    for i in tl.static_range(len(tile)):
        total = total + (tile[i] + other[i] * factor[:, None],)
    return total


@triton.jit
def scores(a, b, PRECISION: tl.constexpr):
    """a @ b.T of two tiles of rows: float32 [rows of a, rows of b]."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION)
    return total


@triton.jit
def _add_scores(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b.T."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION)
    return total


@triton.jit
def scores_sum(a, b, a2, b2, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T + a2 @ b2.T, without a product that lacks an operand; at least one is complete.

    FIRST is len(a) * len(b) and SECOND is len(a2) * len(b2). As constants they keep the instances of this function
    apart: Triton 3.6 names an instance by its constants and by the flattened types of its arguments, in which neither
    an absent operand nor the end of a tuple shows, and takes one instance for another of the same name.
    """
    if FIRST == 0:
        return scores(a2, b2, PRECISION)
    elif SECOND == 0:
        return scores(a, b, PRECISION)
    else:
        return _add_scores(scores(a, b, PRECISION), a2, b2, PRECISION)


@triton.jit
def scores_and_tangent(a, b, a_t, b_t, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T and a_t @ b.T + a @ b_t.T; FIRST is len(a_t) * len(b) and SECOND len(a) * len(b_t), as in scores_sum.

    Chunk by chunk: without tensor cores a thread holds rows of both operands, and those of all chunks fit no registers.
    """
    s = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    s_t = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):  # mutate: for i tl
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
        if FIRST > 0:
            s_t = tl.dot(a_t[i], tl.trans(b[i]), s_t, input_precision=PRECISION)
        if SECOND > 0:
            s_t = tl.dot(a[i], tl.trans(b_t[i]), s_t, input_precision=PRECISION)
    return s, s_t


@triton.jit
def add_product(tile, weights, x, PRECISION: tl.constexpr):
    """tile + weights @ x with the weights rounded to x's type."""
    factor = _round_to_tf32(weights.to(x[0].dtype), PRECISION)
    total = ()
    for i in tl.static_range(len(tile)):
        total = total + (tl.dot(factor, x[i], tile[i], input_precision=PRECISION),)
    return total


@triton.jit
def load_mask(mask, m0, n0, row, column, M, N, MASK_LAYOUT: tl.constexpr):
    """A tile of a mask from query m0 and key n0 on, 0 beyond query M and key N; `row` and `column` count from there.

    `mask` is (pointer, row stride) and MASK_LAYOUT its column stride, 0 or 1, whether its rows start and end at
    multiples of 16 elements less than 2^23 apart, which makes its loads wide, whether it is additive, and whether a
    row may be without a key, by a mask or otherwise.
    """
    COLUMN_STRIDE: tl.constexpr = MASK_LAYOUT[0]
    ALIGNED: tl.constexpr = MASK_LAYOUT[1]
    first, row_stride = mask
    if ALIGNED:
        stride = tl.cast(row_stride, tl.uint32)
        # mutate: tile
        tile = tl.multiple_of(first + tl.cast(m0, tl.uint32).to(tl.uint64) * stride + tl.cast(n0, tl.uint32), 16)
        # mutate: offsets
        offsets = tl.multiple_of(row.to(tl.uint32) * stride, (16, 16)) + column.to(tl.uint32)
        inside = (row < M - m0) & (column // 16 < (N - n0) // 16)  # mutate: inside
    else:
        tile = first + tl.cast(m0, tl.int64) * row_stride + n0 * COLUMN_STRIDE
        offsets = row.to(tl.int64) * row_stride + column * COLUMN_STRIDE
        inside = (row < M - m0) & (column < N - n0)
    return tl.load(tile + offsets, mask=inside, other=0)


@triton.jit
def exponential(x, ADDITIVE: tl.constexpr):
    """exp of a difference of scores as `biased_scores` gives them."""
    if ADDITIVE:
        return tl.exp2(x * 1.4426950408889634)  # mutate: return tl exp2
    else:
        return tl.exp2(x)


@triton.jit
def biased_scores(
    s, scale, mask, m0, n0, row, column, M, N, at_border,
    MASK_LAYOUT: tl.constexpr, EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The scores (1) of products `s`: scaled, masked and, `at_border`, with the key end (EDGE) and DIAGONAL.

    In base 2, but with an additive mask in nats: times log2(e) a finite bias may be infinite, and its rounding would
    not be that of dense attention. The multiply-add is one instruction here and in the backward pass, since P there has
    to come from the same scores.

    The tile starts at query m0 and key n0; `row` and `column` count from there, shaped to broadcast to `s` in either
    orientation. One loop that branches here takes fewer registers than a loop over the full tiles and a second one over
    those at a border.
    """
    ADDITIVE: tl.constexpr = MASK_LAYOUT[2]
    if ADDITIVE:
        bias = load_mask(mask, m0, n0, row, column, M, N, MASK_LAYOUT)
        s = s * scale + bias.to(tl.float32)  # mutate: s (1)
    else:
        s *= scale * 1.4426950408889634
        if len(mask) > 0:
            allowed = load_mask(mask, m0, n0, row, column, M, N, MASK_LAYOUT)
            s = tl.where(allowed != 0, s, float("-inf"))
    if (EDGE or DIAGONAL) and at_border:
        if EDGE:
            s = tl.where(column < N - n0, s, float("-inf"))  # mutate: s (2)
        if DIAGONAL:
            s = tl.where(column <= row + (m0 - n0), s, float("-inf"))  # mutate: s (3)
    return s
