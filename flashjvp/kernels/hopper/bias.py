"""Additive masks: each thread reads the numbers that it adds from global memory; MATH.md (1), section 6.

No copy is made, so a mask may be broadcast and have any strides but that of its last dim. Numbers are read before the
wait for a tile, in the order of its accumulator. Scores with a mask are in nats.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...layout import is_additive
from ..launch.argument import Argument
from ..launch.call import Call
from .blocks import CONSUMER_ROWS
from .pipeline import keep_above

# Of a square of 16-bit numbers.
TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")
# Two bfloat16 as float32: LLVM takes an instruction more.
WIDEN = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
LOG2_E = gl.constexpr(1.4426950408889634)


def bias_of_call(call: Call) -> tuple[Argument | None, tuple[bool, ...]]:
    """The additive mask of a call as a kernel takes it, None without one, and its BIAS_LAYOUT: whether 16 divides the
    number of keys and all strides, which makes loads wide, and whether its numbers have 16 bits."""
    if call.mask_tensor is None or not is_additive(call.mask_tensor):
        return None, ()
    _, is_aligned, *_ = call.mask_layout
    return call.mask, (is_aligned, call.mask_tensor.element_size() == 2)


@gluon.jit
def bias_operand(bias, log_l):
    """The mask of all heads and in a backward pass log(l) * log2(e) of all rows, as partitions take them; () without a
    mask."""
    if bias is None:
        return ()
    elif log_l is None:
        return (bias.ptr, bias.strides)
    else:
        return (bias.ptr, bias.strides, log_l)


@gluon.jit
def bias_of_head(bias, batch, head):
    """The mask of one head: its first row, the stride of rows, and what else `bias_operand` has; () without one."""
    if len(bias) == 0:
        return ()
    else:
        # Odd numbers stand for the strides of heads and batch entries: tiles.odd.
        row, head_stride, batch_stride = bias[1]
        # mutate: offset
        offset = head.to(gl.int64) * ((head_stride - 3) >> 1) + batch.to(gl.int64) * ((batch_stride - 3) >> 1)
        return (bias[0] + offset, gl.cast(row, gl.int32)) + bias[2:]


@gluon.constexpr_function
def _in_squares(groups):
    """The layout of a [64, 8 * groups] accumulator as squares, [warp, half, row, group, column]. A warp has 16 rows, a
    thread of each square two columns of a row."""
    registers = [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]] + [[0, 0, 0, 1 << i, 0] for i in range(groups.bit_length() - 1)]
    lanes = [[0, 0, 0, 0, 2], [0, 0, 0, 0, 4], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]]
    warps = [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [4, 2, 8, groups, 8])


@gluon.constexpr_function
def _along(layout, dim):
    """The layout of a tensor with only this dim of five."""
    for other in reversed(range(5)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _places(GROUPS: gl.constexpr):
    """(warp, half, row, group, column) of a tile in squares, each shaped to broadcast."""
    LAYOUT: gl.constexpr = _in_squares(GROUPS)
    warp = gl.arange(0, 4, _along(LAYOUT, 0))[:, None, None, None, None]
    half = gl.arange(0, 2, _along(LAYOUT, 1))[None, :, None, None, None]
    row = gl.arange(0, 8, _along(LAYOUT, 2))[None, None, :, None, None]
    group = gl.arange(0, GROUPS, _along(LAYOUT, 3))[None, None, None, :, None]
    column = gl.arange(0, 8, _along(LAYOUT, 4))[None, None, None, None, :]
    return warp, half, row, group, column


@gluon.jit
def _row_offsets(query, M, row_stride, ALIGNED: gl.constexpr):
    """Where the rows of these queries begin; queries beyond the end take the last one's place."""
    offsets = gl.minimum(query, M - 1) * row_stride  # mutate: offsets
    return gl.multiple_of(offsets, (16, 16, 16, 16, 16)) if ALIGNED else offsets


@gluon.jit
def bias_by_key(bias, row0, tile, M, N, COLUMNS: gl.constexpr, BIAS_LAYOUT: gl.constexpr, MASKED: gl.constexpr):
    """Where the mask [64 queries, COLUMNS keys] of queries from `row0` on lies, in squares, and which keys exist where
    not all do; () without a mask.

    It is loaded where it is added: registers are short, and loading it before the wait for the tile was no faster. Only
    MASKED tiles have keys beyond the end, whose scores nobody reads.
    """
    if len(bias) == 0:
        return ()
    else:
        ALIGNED: gl.constexpr = BIAS_LAYOUT[0]
        GROUPS: gl.constexpr = COLUMNS // 8
        warp, half, row, group, column = _places(GROUPS)
        first = bias[0] + tile * COLUMNS
        if ALIGNED:
            first = gl.multiple_of(first, 16)
        rows = first + _row_offsets(row0 + (warp * 16 + half * 8 + row), M, bias[1], ALIGNED)
        pointers = rows + (group * 8 + column)
        if not MASKED:
            return (pointers,)
        elif ALIGNED:
            return pointers, tile * GROUPS + group < N // 8
        else:
            return pointers, tile * COLUMNS + (group * 8 + column) < N


@gluon.jit
def load_bias_by_query(bias, number, row0, tile, M, N, COLUMNS: gl.constexpr, BIAS_LAYOUT: gl.constexpr):
    """(The mask [64 keys, COLUMNS queries] of keys from `row0` on, in squares, and where log(l) of the queries of head
    `number` of all begins), or () without a mask.

    Squares of 16-bit numbers are not transposed yet: they are read as they lie in memory, two numbers at a time. Keys
    beyond the end read -inf.
    """
    if len(bias) == 0:
        return ()
    else:
        ALIGNED: gl.constexpr = BIAS_LAYOUT[0]
        IS_HALF: gl.constexpr = BIAS_LAYOUT[1]
        warp, half, row, group, column = _places(COLUMNS // 8)
        if IS_HALF:
            key, query = column, row
        else:
            key, query = row, column  # mutate: key, query
        first = bias[0] + row0
        if ALIGNED:
            first = gl.multiple_of(first, 16)
        rows = first + _row_offsets(tile * COLUMNS + (group * 8 + query), M, bias[1], ALIGNED)
        pointers = rows + (warp * 16 + half * 8 + key)
        exists = row0 // 8 + (warp * 2 + half) < N // 8 if ALIGNED else row0 + (warp * 16 + half * 8 + key) < N
        log_l = bias[2] + (number.to(gl.int64) * (gl.cdiv(M, 128) * 128) + tile * COLUMNS)  # mutate: log_l
        return gl.load(pointers, mask=exists, other=float("-inf")), log_l  # mutate: return gl load


@gluon.jit
def add_bias_by_key(s, scale, bias, LAYOUT: gl.constexpr):
    """The scores [queries, keys] in nats, of products s."""
    if len(bias) == 1:
        return _add_bias(s, scale, gl.load(bias[0]), LAYOUT)
    else:
        return _add_bias(s, scale, gl.load(bias[0], mask=bias[1]), LAYOUT)


@gluon.jit
def _add_bias(s, scale, bias, LAYOUT: gl.constexpr):
    """s * scale + bias, a multiply-add in all kernels: P in the backward pass has to come from the same scores."""
    if bias.dtype == gl.bfloat16:
        bias = gl.inline_asm_elementwise(WIDEN, "=f,=f,r", [bias], gl.float32, is_pure=True, pack=2)
    bias = gl.convert_layout(bias.reshape([CONSUMER_ROWS, s.shape[1]]), LAYOUT)
    return s * scale + bias.to(gl.float32)  # mutate: return s bias


@gluon.jit
def probabilities_of_keys(s, lse, scale, bias, passed, LAYOUT: gl.constexpr):
    """P [keys, queries] of a backward kernel; `lse` [1, queries] is m with a mask. `passed` is for `keep_above`."""
    if len(bias) == 0:
        return gl.exp2(s * (scale * LOG2_E) - lse)
    else:
        keep_above(passed)  # else what follows waits for the mask before the first product is issued
        bias, log_l = bias
        if bias.dtype != gl.float32:
            bias = gl.inline_asm_elementwise(TRANSPOSE, "=r,r", [bias], bias.dtype, is_pure=True, pack=2)
        log_l = gl.load(log_l + gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT)))[None, :]
        return _probabilities(_add_bias(s, scale, bias, LAYOUT), lse, log_l)


@gluon.jit
def probabilities_of_queries(s, lse, log_l, scale, bias, LAYOUT: gl.constexpr):
    """P [queries, keys] of a backward kernel; with a mask `lse` is m, and `log_l` is (log(l),)."""
    if len(bias) == 0:
        return gl.exp2(s * (scale * LOG2_E) - lse)
    else:
        return _probabilities(add_bias_by_key(s, scale, bias, LAYOUT), lse, log_l[0])


@gluon.jit
def _probabilities(s, m, log_l):
    """The largest score of a row is taken off first: beside a mask of -1e9, log(l) would be lost."""
    return gl.exp2((s - m) * LOG2_E - log_l)  # mutate: return gl exp2
