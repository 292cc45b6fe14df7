"""The planted bugs of windows and block masks (checks/partial.py)."""

from .fault import Fault, Stage

VISIBLE, PLAN = "kernels/portable/visible.py", "backends/block_plan.py"
STAGE: Stage = "windows, block masks"
WIDE, LONG = "lengths_33_257", "lengths_257_33"

HOPPER = "kernels/hopper/"


def _listed(name: str, marker: str, statement: str, case: str = "hopper_blocks") -> Fault:
    return Fault(f"block masks: {name}", STAGE, HOPPER + "listed.py", marker, statement, case, "emulated-block-masks")


def _band(name: str, marker: str, statement: str, case: str = "hopper_blocks", file: str = "band.py") -> Fault:
    return Fault(f"windows: {name}", STAGE, HOPPER + file, marker, statement, case, "emulated-windows")


OF_PARTIAL = [
    Fault(
        "window starts a tile late", STAGE, VISIBLE, "start",
        "start = tl.cdiv(tl.maximum(m0 + low, 0), BLOCK_N) * BLOCK_N", WIDE, "windows",
    ),
    Fault(
        "window ends with the first query's", STAGE, VISIBLE, "end",
        "end = tl.minimum(N, tl.maximum(m0 + 1 + high, 0))", LONG, "windows",
    ),
    Fault(
        "last queries of a window without gradient", STAGE, VISIBLE, "last",
        "last = tl.minimum(M, tl.maximum(n0 - low, 0))", LONG, "windows",
    ),
    Fault(
        "left end of a window unmasked", STAGE, VISIBLE, "return i (1)",
        "return i, i >= full, (low, high)", WIDE, "windows",
    ),
    Fault(
        "left end of a window unmasked for keys", STAGE, VISIBLE, "return i (2)",
        "return i, i < full, (low, high)", WIDE, "windows",
    ),
    Fault(
        "window off by one", STAGE, VISIBLE, "s (1)",
        's = tl.where((distance > low) & (distance <= high), s, float("-inf"))', check="windows",
    ),
    Fault(
        "bitmap of a block transposed", STAGE, VISIBLE, "s (2)",
        's = tl.where((word >> (row % 32)) & 1 != 0, s, float("-inf"))', check="block-masks",
    ),
    Fault(
        "blocks of the first head", STAGE, VISIBLE, "place",
        "place = batch % entries * heads * blocks + number", "gqa", "block-masks",
    ),
    Fault(
        "queries of the first block of keys", STAGE, "kernels/portable/partial.py", "seen",
        "seen = (plan, 0, 0, 0)", WIDE, "block-masks",
    ),
    Fault("window aligned with the first query", STAGE, "backends/partial.py", "shift", "shift = 0", check="windows"),
    Fault(
        "causal ignored beside a window", STAGE, "backends/partial.py", "return Band",
        "return Band(low, high)", "causal_33_80", "windows",
    ),
    Fault(
        "tiles: window off by one", STAGE, "backends/patterns.py", "return difference",
        "return ((difference >= self.low) & (difference < self.high))[None, None]", check="windows",
    ),
    Fault(
        "quadrants of queries for keys", STAGE, PLAN, "of_columns",
        "of_columns[partial] = _as_bits(quadrants.flatten(1))", "hopper_blocks", "emulated-block-masks",
    ),
    _listed(
        "blocks of the first head", "place",
        "place = (batch % entries) * heads * gl.cdiv(rows, BLOCK) + row0 // BLOCK",
    ),
    _listed("bitmaps of the other side", "words", "words = plan + gl.load(plan + (5 - OF + AT_WORDS))"),
    _listed("first tile of a block for all", "return block", "return block * BLOCK", "hopper_blocks_128"),
    _listed(
        "bits of a block's first tile for all", "return load_mask_tile",
        "return load_mask_tile((words, BLOCK, 0), consumer * CONSUMER_ROWS, tile * 0, COLUMNS)", "hopper_blocks_128",
    ),
    _listed(
        "bits of the first consumer for both", "return load_mask_tile",
        "return load_mask_tile((words, BLOCK, 0), 0, tile % (BLOCK // COLUMNS), COLUMNS)",
    ),
    _listed(
        "first half of a block for both", "quadrants",
        "quadrants = quadrants & 5", "hopper_blocks_128",
    ),
    _listed(
        "consumers exchanged", "return quadrants",
        "return quadrants != 0, (quadrants & 12) != 0, (quadrants & 3) != 0",
    ),
    _listed("d_q of a head's first tile", "before", "before = head * program.loop.end", "hopper_blocks_128"),
    Fault(
        "block masks: a key head for each query head", STAGE, HOPPER + "block_mask_forward.py", "block, loop",
        "block, loop = query_block(M, N, heads, 1, KEYS, True)", "hopper_blocks", "emulated-block-masks",
    ),
    Fault(
        "block masks: keys' gradients from one head of a group", STAGE, HOPPER + "block_mask_backward.py",
        "block, loop", "block, loop = key_block(M, N, heads, 1, ROWS, False)", "hopper_blocks", "emulated-block-masks",
    ),
    _band("end with the first row's", "end", "end = gl.minimum(row0 + 1 + band.high, band.end) - band.first"),
    _band("left end unmasked", "whole_begin", "whole_begin = begin"),
    _band("right end unmasked", "whole_end", "whole_end = end"),
    _band(
        "a column of the next thread", "bits",
        "bits = (count >> 3) * 2 + gl.minimum(gl.maximum((count & 7) - quarter, 0), 2)",
    ),
    _band("off by one", "low", "low = gl.minimum(gl.maximum(row + 1 + (seen.low - first), 0), COLUMNS)"),
    _band("keys beyond the end", "high", "high = gl.minimum(gl.maximum(row + (seen.high - first), 0), COLUMNS)"),
    _band(
        "keys beyond the end in sums of d_q", "high (2)", "high = high + 0 * rows",
        "hopper_72_low_scores",
    ),
    _band(
        "tiles passed over that the last row sees", "return first",
        "return (first < seen.high) & (first + COLUMNS > seen.low)", "hopper_blocks_128",
    ),
    _band("d_q of the first tiles", "before", "before = head * loop.end + i", "hopper_blocks_72"),
    _band("second end from the first one's start", "first", "first = tiles.whole + 0 * side"),
    _band(
        "one pass: the mask of the tile before", "mask",
        "mask = visible(seen, program.N - block.row0, i + shift - 1, ROWS)", "hopper_blocks_128",
        "band_one_pass.py",
    ),
    _band(
        "one pass: keys' gradients from one head of a group", "block, loop, band",
        "block, loop, band = place_of_keys(cu, low, high, M, N, heads, 1, ROWS, 1)", "hopper_blocks_128",
        "band_one_pass.py",
    ),
    _band(
        "of the other side for keys", "band",
        "band = Band(block.batch, 0, loop.end * ROWS, low, high, block.batch * heads, 0)", file="band_place.py",
    ),
    _band(
        "a key head for each query head", "block, loop, band",
        "block, loop, band = place_of_queries(cu, low, high, M, N, heads, 1, KEYS)", file="band_forward.py",
    ),
    _band(
        "keys' gradients from one head of a group", "block, loop, band",
        "block, loop, band = place_of_keys(cu, low, high, M, N, heads, 1, ROWS)", file="band_backward.py",
    ),
    Fault(
        "partial blocks left out", STAGE, PLAN, "partial",
        "partial[entry, head, row, column] = seen & all_seen", check="block-masks",
    ),
]  # fmt: skip
