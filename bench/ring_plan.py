"""What several GPUs should take for one sequence, from stated rates: bytes sent, and the efficiency that follows.

Computed, not measured. With N tokens over R GPUs, a GPU has n = N / R. All rates are of one GPU, in SI units. A step of
a ring computes n queries over n keys; its messages count only as far as they take longer. A merge, and the sums of
gradients, are passes over memory that nothing hides. Ulysses hides nothing.
"""

from dataclasses import dataclass

FORWARD, BACKWARD = 12, 30  # operations over HMND, as bench.cases counts them
RING_TENSORS = {"fwd": 4, "bwd": 8}  # k, v, k_t, v_t; in the backward pass their gradients, too
ULYSSES_TENSORS = {"fwd": 8, "bwd": 16}
"""Six inputs, then o and o_t; with o, o_t and their cotangents ten, then six gradients."""
PASSES_BYTES = {"fwd": 52, "bwd": 76}
"""What a step's merge, and its sums of gradients, read and write at most for each number of a tensor."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of attention, forward and backward; bytes a second sent to other GPUs, and of memory."""

    forward: float
    backward: float
    link: float
    memory: float


@dataclass(frozen=True)
class Plan:
    """Of one pass: bytes that a GPU sends, seconds, and one GPU's time over R times this."""

    sent_bytes: float
    seconds: float
    efficiency: float


def ring(mode: str, tokens: int, gpus: int, heads: int, head_dim: int, rates: Rates, element_bytes: int = 2) -> Plan:
    """A ring without a mask, or with a causal one as zig-zag (all of it then takes half, and messages count twice)."""
    count, rate = (FORWARD, rates.forward) if mode == "fwd" else (BACKWARD, rates.backward)
    numbers = tokens / gpus * heads * head_dim
    step = count * numbers * (tokens / gpus) / rate
    message = RING_TENSORS[mode] * numbers * element_bytes / rates.link
    passes = PASSES_BYTES[mode] * numbers / rates.memory
    last = RING_TENSORS["fwd"] * numbers * element_bytes / rates.link if mode == "bwd" and gpus > 1 else 0.0
    hidden = (gpus - 1) * max(step, message) + step
    return _plan(
        RING_TENSORS[mode] * (gpus - 1) * numbers * element_bytes,
        hidden + last + (gpus * passes if gpus > 1 else 0.0), gpus**2 * step, gpus,
    )  # fmt: skip


def ulysses(mode: str, tokens: int, gpus: int, heads: int, head_dim: int, rates: Rates, element_bytes: int = 2) -> Plan:
    """An exchange of rows for heads, and the way back, before and after the computation."""
    count, rate = (FORWARD, rates.forward) if mode == "fwd" else (BACKWARD, rates.backward)
    alone = count * heads * head_dim * tokens**2 / rate
    sent = ULYSSES_TENSORS[mode] * tokens / gpus * heads * head_dim * element_bytes * (gpus - 1) / gpus
    return _plan(sent, alone / gpus + sent / rates.link, alone, gpus)


def _plan(sent_bytes: float, seconds: float, alone: float, gpus: int) -> Plan:
    return Plan(sent_bytes, seconds, alone / gpus / seconds)
