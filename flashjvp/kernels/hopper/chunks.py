"""Tiles whose head dim is split into column chunks, and the products of such tiles.

A head dim that is no power of two is padded to two of them, 72 to 64 + 16; the columns from 72 on load as zeros and are
not stored. Each chunk has its own descriptor, tile in shared memory and accumulator. They travel in flat tuples, the
chunks of a tensor side by side. A product of two tiles puts as many instructions in flight as there are chunks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .blocks import CONSUMER_ROWS
from .pipeline import accumulator, left_operand
from .triton_compat import ARITHMETIC_SINKS, addressed_here


@gluon.jit
def chunks(first, rest):
    """The descriptors of a tensor's one or two chunks."""
    if rest is None:
        return (first,)
    else:
        return (first, rest)


@gluon.jit
def by_tensor(tiles, CHUNKS: gl.constexpr):
    """A flat tuple as a tuple with the chunks of each tensor."""
    found = ()
    for i in gl.static_range(len(tiles) // CHUNKS):
        tensor = ()
        for j in gl.static_range(CHUNKS):
            tensor = tensor + (tiles[i * CHUNKS + j],)
        found = found + (tensor,)
    return found


@gluon.jit
def flat(tensors):
    """The chunks of all tensors side by side."""
    found = ()
    for i in gl.static_range(len(tensors)):
        found = found + tensors[i]
    return found


@gluon.jit
def zero(WIDTH: gl.constexpr):
    """A zero accumulator of 64 rows."""
    return gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, accumulator(WIDTH))


@gluon.jit
def zeros(tiles):
    """Zero accumulators of 64 rows, as wide as the tiles [..., D]."""
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (zero(tiles[i].shape[4]),)
    return found


@gluon.jit
def _addressed(x, WHOLE: gl.constexpr = True):
    """An operand, in shared memory or in registers. Halves of pairs are not WHOLE: `split_rows` has addressed them."""
    if WHOLE and isinstance(x, gl.shared_memory_descriptor):
        return addressed_here(x)
    else:
        return x


@gluon.jit
def add_scores(acc, x, y, USE_ACC: gl.constexpr = True, WHOLE: gl.constexpr = True):
    """acc + x @ y.T, summed over the chunks; in flight. WHOLE: whether y is."""
    for i in gl.static_range(len(x)):
        acc = warpgroup_mma(
            _addressed(x[i]), _addressed(y[i], WHOLE).permute((1, 0)), acc, use_acc=USE_ACC or i > 0, is_async=True
        )  # mutate: acc
    return acc


@gluon.jit
def left_operands(weights, tile):
    """The weights as left operands for products with each chunk: the same registers, but another layout."""
    found = ()
    for i in gl.static_range(len(tile)):
        found = found + (gl.convert_layout(weights, left_operand(tile[i].shape[1])),)
    return found


@gluon.jit
def add_product(acc, weights, tile, WHOLE: gl.constexpr = True):
    """acc + weights @ tile for each chunk; in flight. WHOLE: whether the tile is."""
    found = ()
    for i in gl.static_range(len(tile)):
        found = found + (warpgroup_mma(weights[i], _addressed(tile[i], WHOLE), acc[i], is_async=True),)
    return found


@gluon.jit
def complete(accs):
    """Waits for all products in flight, and returns the accumulators."""
    found = warpgroup_mma_wait(0, deps=accs)
    if len(accs) == 1:
        return (found,)
    else:
        return found


@gluon.jit
def scaled(accs, factor):
    """Each accumulator times one number."""
    found = ()
    for i in gl.static_range(len(accs)):
        found = found + (accs[i] * factor,)
    return found


@gluon.jit
def scale_rows(acc, factor):
    """Each row of all chunks times its own factor, [64] in any layout."""
    found = ()
    for i in gl.static_range(len(acc)):
        row = gl.convert_layout(factor, gl.SliceLayout(1, accumulator(acc[i].shape[1])))
        found = found + (acc[i] * row[:, None],)
    return found


@gluon.constexpr_function
def _times_unless_one(count):
    """Assembly that multiplies `count` numbers of a thread by their factors, but is skipped by a warp whose factors are
    all 1.

    Triton has no branches of a warp. Numbers are of two rows by turns of two.
    """
    # mutate: asked
    asked = f"setp.neu.f32 p, ${2 * count}, 0f3F800000; setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;"
    products = " ".join([f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)])
    # mutate: return f reg
    return f"{{.reg .pred p; {asked} vote.sync.any.pred p, p, -1; @!p bra.uni SAME; {products} SAME:}}"


@gluon.constexpr_function
def _in_place(count):
    """The constraints of that assembly: each number stays in its register."""
    return ",".join(["=f"] * count + [f"{i}" for i in range(count)] + ["f"] * count)


@gluon.jit
def _lazy_rescale(acc, factor, HERE: gl.constexpr):
    COUNT: gl.constexpr = acc.shape[1] // 2  # of a thread, one of 128 for 64 rows
    row = gl.convert_layout(factor, gl.SliceLayout(1, accumulator(acc.shape[1])))[:, None]
    if COUNT < 16:  # about as many products as instructions to branch around them
        return acc * row
    else:
        MAY_MOVE: gl.constexpr = not (HERE and ARITHMETIC_SINKS)
        return gl.inline_asm_elementwise(
            _times_unless_one(COUNT), _in_place(COUNT), [acc, row], gl.float32, is_pure=MAY_MOVE, pack=COUNT
        )


@gluon.jit
def lazy_rescale(acc, factor, HERE: gl.constexpr = False):
    """`scale_rows` for factors that are mostly 1: warps without another factor skip it. HERE keeps it above the next
    wait."""
    found = ()
    for i in gl.static_range(len(acc)):
        found = found + (_lazy_rescale(acc[i], factor, HERE),)
    return found


@gluon.jit
def add(x, y):
    """x + y, chunk by chunk.

    For a difference negate a factor: LLVM spends an instruction on negating what assembly gave.
    """
    found = ()
    for i in gl.static_range(len(x)):
        found = found + (x[i] + y[i],)
    return found
