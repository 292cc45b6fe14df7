"""What differs between the Tritons that the kernels here serve: names, and what is made of the same code.

3.8 renamed the copies by TMA, 3.9 `_reinterpret`; what else was renamed is called by position. From 3.8 on a sum over
columns adds neighbours first, as a tree. From 3.9 on LLVM sees the addresses of products as pairs of 32 bits and makes
those of a whole loop at its start, more than there are registers for. It also moves arithmetic down to where its result
is used, behind a wait for products that it was to overlap with.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ... import environment

RELEASE = environment.triton_release()

load_tile = tma.async_load if RELEASE >= (3, 8) else tma.async_copy_global_to_shared
store_tile = tma.async_store if RELEASE >= (3, 8) else tma.async_copy_shared_to_global

SUMS_ARE_TREES = gl.constexpr(RELEASE >= (3, 8))
CONDITIONS_ARE_VECTORS = gl.constexpr(RELEASE >= (3, 9))
ADDRESSES_COME_FIRST = gl.constexpr(RELEASE >= (3, 9))
RENAMED_REINTERPRET = gl.constexpr(RELEASE >= (3, 9))
ARITHMETIC_SINKS = gl.constexpr(RELEASE >= (3, 9))

LESS = gl.constexpr("{.reg .pred p; setp.lt.s32 p, $1, $2; selp.f32 $0, $3, $4, p;}")


@gluon.jit
def reinterpret_tile(tensor, tile):
    """A tile's shared memory as a tile of the tensor that is described."""
    if RENAMED_REINTERPRET:
        return tile.reinterpret(tensor.dtype, tensor.block_shape, tensor.layout)
    else:
        return tile._reinterpret(tensor.dtype, tensor.block_shape, tensor.layout)


@gluon.jit
def reinterpret(tile, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """A tile's shared memory as another tile."""
    if RENAMED_REINTERPRET:
        return tile.reinterpret(dtype, shape, layout)
    else:
        return tile._reinterpret(dtype, shape, layout)


@gluon.jit
def here():
    """0, of which LLVM does not know that, and knows nothing before this point. ptxas does: it costs nothing."""
    if ADDRESSES_COME_FIRST:
        return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)
    else:
        return 0


@gluon.jit
def addressed_here(tile):
    """The tile [rows, columns], with addresses that are not made before this point. It may be some rows of another one,
    if its columns are those of one swizzled block."""
    if ADDRESSES_COME_FIRST:
        return tile.reinterpret(tile.dtype, [1, tile.shape[0], tile.shape[1]], tile.layout).index(here())
    else:
        return tile


@gluon.jit
def made_here(x):
    """x, float32, computed no later than here: LLVM knows nothing of what assembly does with it."""
    if ARITHMETIC_SINKS:
        return gl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=False, pack=1)
    else:
        return x


@gluon.jit
def where_less(a, b, x, other):
    """x where a < b, other elsewhere; the integers a and b broadcast to a tile, x or other may be a number."""
    if CONDITIONS_ARE_VECTORS:
        return gl.inline_asm_elementwise(LESS, "=f,r,r,f,f", [a, b, x, other], gl.float32, is_pure=True, pack=1)
    else:
        return gl.where(a < b, x, other)


@gluon.constexpr_function
def _doublings(small, large):
    return (large // small).bit_length() - 1


@gluon.jit
def sum_of_products(x, y, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of x * y, in this layout, over columns: a multiply-add for each product. Blocks of COLUMNS columns lie in
    other registers of the same threads."""
    if SUMS_ARE_TREES:
        xs, ys = (x,), (y,)
        for _ in gl.static_range(_doublings(COLUMNS, x.shape[1])):
            xs, ys = _halves(xs), _halves(ys)
        total = xs[0] * ys[0]
        for i in gl.static_range(1, len(xs)):
            total += xs[i] * ys[i]
        return gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, LAYOUT))
    else:
        return gl.sum(x * y, 1)


@gluon.jit
def _halves(parts):
    found = ()
    for i in gl.static_range(len(parts)):
        x = parts[i]
        left, right = gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)))
        found = found + (left, right)
    return found
