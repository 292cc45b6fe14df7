"""What is measured: the case, its inputs, its count of operations and the least memory it can take."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from verify.cases import Inputs

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MODES = ("fwd", "fwd+bwd")
REDUCED_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape in one mode; the fields are the identity columns of a row.

    q is [batch, heads, queries, head_dim], k and v are [batch, kv_heads, keys, head_dim]. Mode `fwd` is o and o_t;
    `fwd+bwd` adds the gradients of both outputs, with both cotangents, in all six inputs.
    """

    mode: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    causal: bool
    mask: str = "none"

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.head_dim)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be at least 1, not {sizes}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv-heads ({self.kv_heads})")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.mask != "none":
            raise ValueError(f"mask must be none, not {self.mask!r}")

    @property
    def backward(self) -> bool:
        return self.mode == "fwd+bwd"


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal inputs in the case's dtype, the cotangents only when there is a backward."""
    generator = torch.Generator(device).manual_seed(seed)
    q_shape = (case.batch, case.heads, case.queries, case.head_dim)
    k_shape = (case.batch, case.kv_heads, case.keys, case.head_dim)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    return Inputs(
        q=normal(q_shape),
        k=normal(k_shape),
        v=normal(k_shape),
        q_t=normal(q_shape),
        k_t=normal(k_shape),
        v_t=normal(k_shape),
        d_o=normal(q_shape) if case.backward else None,
        d_o_t=normal(q_shape) if case.backward else None,
        is_causal=case.causal,
    )


def require_gradients(inputs: Inputs) -> None:
    """Marks q, k, v and their tangents as leaves whose gradients are wanted."""
    for x in six(inputs):
        x.requires_grad_()


def six(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, q_t, k_t, v_t, which every case has."""
    assert inputs.q_t is not None and inputs.k_t is not None and inputs.v_t is not None
    return inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t


def operations(case: Case) -> float:
    """Floating-point operations by which throughput is reported: 12 BHMND for forward with JVP, 30 for the backward.

    Half when causal with as many queries as keys, where half of the scores are never needed.
    """
    count = (42 if case.backward else 12) * case.batch * case.heads * case.queries * case.keys * case.head_dim
    return count / 2 if case.causal and case.queries == case.keys else count


def inputs_mib(case: Case) -> float:
    """q, k, v and their tangents, and the two cotangents when there is a backward."""
    q_side, key_side = _element_counts(case)
    return (2 * (q_side + 2 * key_side) + (2 * q_side if case.backward else 0)) * _width(case) / 2**20


def least_mib(case: Case) -> float:
    """What any implementation holds at its end: inputs, outputs, gradients and row statistics.

    The statistics are lse and mu, with a backward also row_a and row_delta, in float32 (float64 for float64 inputs).
    """
    q_side, key_side = _element_counts(case)
    outputs = 2 * q_side + (2 * (q_side + 2 * key_side) if case.backward else 0)
    statistics = (4 if case.backward else 2) * case.batch * case.heads * case.queries
    return inputs_mib(case) + (outputs * _width(case) + statistics * max(4, _width(case))) / 2**20


def reduced(case: Case) -> Case:
    """A case small enough for dense float64: the same head dim, dtype and mask, two batches and key heads at most.

    Lengths keep their remainder by 128, so that a ragged edge is still one.
    """
    group = case.heads // case.kv_heads
    kv_heads = min(case.kv_heads, 2)
    return dataclasses.replace(
        case,
        batch=min(case.batch, 2),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=_reduced_length(case.queries),
        keys=_reduced_length(case.keys),
    )


def _reduced_length(length: int) -> int:
    if length <= REDUCED_LENGTH:
        return length
    return REDUCED_LENGTH if length % 128 == 0 else 128 + length % 128


def _element_counts(case: Case) -> tuple[int, int]:
    """Elements of one query-side and of one key-side tensor."""
    rows = case.batch * case.head_dim
    return rows * case.heads * case.queries, rows * case.kv_heads * case.keys


def _width(case: Case) -> int:
    """Bytes an element."""
    return DTYPES[case.dtype].itemsize
