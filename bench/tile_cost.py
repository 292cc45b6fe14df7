"""What a tile costs by count, for cards that nobody has timed: cycles of a multiprocessor for a score, unit by unit.

A tile of r owned rows (of queries, or of keys in the kernels of the key side) and s streamed rows has r * s scores.
For them a program

- multiplies: as many products of r x D with s x D as MATH.md has for the family,
- reads streamed tiles from shared memory, each once for every warp that holds rows of its own (16 at least), and writes
  them there; where there are more warps than that, P and dS go through shared memory, too,
- reads the streamed tiles from the L2 cache,
- issues instructions: products, reads of operands, some for each score, rescaled accumulators, and a loop's overhead.

No unit waits for another where several programs share a multiprocessor, and each waits for all others where one warp
does everything: half of what the busiest unit leaves idle is counted. The rates are those of NVIDIA's white papers. The
order of tiles is all that is asked of these numbers; registers and spills only the compiler knows
(`python -m bench.tune --by-count`).
"""

from typing import NamedTuple

from verify.codegen.command import SHARED_BYTES


class Rates(NamedTuple):
    """What a multiprocessor does in a cycle: multiply-adds of tensor cores by kind, bytes from L2."""

    half: int
    tf32: int
    l2_bytes: int


# GeForce cards add products of half types in float32 at half the rate of others of their architecture.
RATES = {
    "sm_80": Rates(1024, 512, 48),
    "sm_86": Rates(256, 128, 24),
    "sm_89": Rates(256, 128, 16),
    "sm_90": Rates(2048, 1024, 40),
    "sm_100": Rates(4096, 2048, 40),
    "sm_120": Rates(256, 128, 16),
}
SHARED_BYTES_A_CYCLE, ISSUED_A_CYCLE, FMA_A_CYCLE = 128, 4, 128
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread; the count takes in operands that may stay in shared memory, and so errs upwards


class Work(NamedTuple):
    """What a kernel family does with a tile, all tangents and cotangents given; counts of [rows, D] tensors."""

    products: int
    resident: int  # operands of the owned rows
    accumulators: int
    streamed: int  # operands of the streamed rows
    reads: int  # of streamed tiles from shared memory, either way round
    elementwise: int  # instructions for a score
    owns_keys: bool = False


WORK = {
    "forward": Work(6, 2, 2, 4, 4, 14),
    "backward_query": Work(9, 4, 2, 4, 6, 20),
    "backward_key": Work(9, 4, 2, 4, 6, 20, owns_keys=True),
    "backward_value": Work(6, 2, 2, 4, 6, 14, owns_keys=True),
    "backward_key_value": Work(12, 4, 4, 4, 8, 22, owns_keys=True),
    "backward_bias": Work(6, 0, 0, 8, 8, 20),
}
LIVE_SCORES = 4  # tiles of scores in float32 that are alive at a time
OVERHEAD = 60  # instructions of a warp for a turn of the loop: addresses, waits, sums over rows
LATENCY = 600  # cycles until a load that nothing hides has come


def cost(arch: str, kind: str, family: str, width: int, tile: tuple[int, ...]) -> float | None:
    """Cycles for a score; None where the tile cannot fit registers or shared memory.

    `width` is the padded head dim. The backward preprocess reads memory once, whatever its tile.
    """
    if family not in WORK:
        return 1.0 / tile[0] if tile[0] * width <= 1 << 12 else None
    work = WORK[family]
    m, n, warps, stages = tile
    owned, streamed = (n, m) if work.owns_keys else (m, n)
    size = 2 if kind == "half" else 4
    threads, tile_bytes = 32 * warps, streamed * width * size
    in_registers = (work.accumulators * 4 + work.resident * size) * owned * width + LIVE_SCORES * 4 * owned * streamed
    registers = 40 + in_registers / 4 / threads
    shared = work.streamed * tile_bytes * max(1, stages - 1)
    if registers > (1.25 if family == "backward_key_value" else 1.0) * MOST_REGISTERS or shared > SHARED_BYTES[arch]:
        return None
    rates, scores = RATES[arch], owned * streamed
    splits = max(1, min(warps, owned // 16))
    exchanged = 2 * 4 * scores * size if splits < warps else 0
    read = work.reads * tile_bytes * splits + work.streamed * tile_bytes + exchanged
    multiply_adds = work.products * scores * width
    tensor = multiply_adds / (FMA_A_CYCLE if kind == "ieee" else getattr(rates, kind))
    products = multiply_adds / (32 if kind == "ieee" else 16 * 8 * (16 if size == 2 else 8))
    rescaled = 3 * owned * width / 32 if family == "forward" else 0
    instructions = products + read / 512 + work.elementwise * scores / 32 + rescaled + OVERHEAD * warps
    units = [
        tensor, read / SHARED_BYTES_A_CYCLE, work.streamed * tile_bytes / rates.l2_bytes, instructions / ISSUED_A_CYCLE
    ]  # fmt: skip
    programs = max(
        1, min(int(REGISTERS / (min(registers + 40, MOST_REGISTERS) * threads)), SHARED_BYTES[arch] // shared)
    )
    busy = max(units) + (sum(units) - max(units)) / 2
    waits = LATENCY / programs if stages == 1 or family == "backward_bias" else 0.0
    few = max(1.0, 8 / (programs * warps))  # fewer warps than 8 hide no latency of a product
    return (busy * few + waits) / scores
