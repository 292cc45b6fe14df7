"""What is measured: the case, its inputs, its count of operations and the least memory it can take."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from reports.schema import COTANGENTS, MASKS
from verify.cases.inputs import Inputs

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Operations over BHMND, 2 for each matrix product: forward 2 products, with a JVP 6; backward 5, of both outputs 15.
OPERATIONS = {
    "fwd": 12,
    "bwd": 30,
    "fwd+bwd": 42,
    "plain-fwd": 4,
    "plain-bwd": 10,
    "plain-fwd+bwd": 14,
    "approx-fwd": 8,
}
REDUCED_LENGTH = 256
KEPT = 0.7  # of the pairs that a mask allows


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape in one mode; the fields are the identity columns of a row.

    q is [batch, heads, queries, head_dim], k is [batch, kv_heads, keys, head_dim], v the same or of value_dim columns,
    a mask [queries, keys]. reports.schema.Row says what the modes, masks, tangents and cotangents are.
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
    value_dim: int | None = None
    tangents: str = "qkv"
    cotangents: str = "both"

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.width)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be at least 1, not {sizes}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv-heads ({self.kv_heads})")
        of = ("mode", OPERATIONS), ("dtype", DTYPES), ("mask", MASKS), ("cotangents", COTANGENTS)
        for name, allowed in of:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @property
    def width(self) -> int:
        """The head dim of v."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def is_whole(self) -> bool:
        """Whether every tangent and cotangent that the mode may have is there."""
        return self.plain or (self.tangents == "qkv" and self.cotangents == "both")

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode.endswith("bwd")

    @property
    def plain(self) -> bool:
        """Whether there are no tangents."""
        return self.mode.startswith("plain-")

    @property
    def shape(self) -> "Case":
        """What is the same in every mode."""
        return dataclasses.replace(self, mode="fwd")


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal inputs in the case's dtype: tangents unless plain, cotangents only when there is a backward."""
    generator = torch.Generator(device).manual_seed(seed)
    q_shape = (case.batch, case.heads, case.queries, case.head_dim)
    k_shape = (case.batch, case.kv_heads, case.keys, case.head_dim)
    v_shape, o_shape = (*k_shape[:3], case.width), (*q_shape[:3], case.width)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    def tangent(name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None if case.plain or name not in case.tangents else normal(shape)

    def cotangent(name: str) -> Tensor | None:
        given = case.backward and case.cotangents in ("both", name) and not (case.plain and name == "o_t")
        return normal(o_shape) if given else None

    return Inputs(
        q=normal(q_shape),
        k=normal(k_shape),
        v=normal(v_shape),
        q_t=tangent("q", q_shape),
        k_t=tangent("k", k_shape),
        v_t=tangent("v", v_shape),
        d_o=cotangent("o"),
        d_o_t=cotangent("o_t"),
        mask=_make_mask(case, device, generator),
        is_causal=case.causal,
    )


def require_gradients(inputs: Inputs) -> None:
    """Marks q, k, v and their tangents as leaves whose gradients are wanted."""
    for x in differentiable(inputs):
        x.requires_grad_()


def differentiable(inputs: Inputs) -> tuple[Tensor, ...]:
    """q, k, v and the tangents that there are."""
    return tuple(x for x in (inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t) if x is not None)


def operations(case: Case) -> float:
    """Floating-point operations by which throughput is reported, the same for any tangents and cotangents.

    Half when causal with as many queries as keys, where half of the scores are never needed.
    """
    dims = (case.head_dim + case.width) / 2  # as many products have the one as the other, nearly
    count = OPERATIONS[case.mode] * case.batch * case.heads * case.queries * case.keys * dims
    return count / 2 if case.causal and case.queries == case.keys else count


def inputs_mib(case: Case) -> float:
    """q, k, v, their tangents unless plain, the mask, and the cotangents when there is a backward."""
    q_side, key_side = _element_counts(case)
    each = 1 if case.plain else 2
    count = each * (q_side + 2 * key_side) + (each * q_side if case.backward else 0)
    return (count * _width(case) + _mask_bytes(case)) / 2**20


def least_mib(case: Case) -> float:
    """What any implementation holds at its end: inputs, outputs, gradients and row statistics.

    The statistics are lse and mu, with a backward also row_a and row_delta, in float32 (float64 for float64 inputs);
    plain, they are lse and row_delta.
    """
    q_side, key_side = _element_counts(case)
    each = 1 if case.plain else 2
    outputs = each * q_side + (each * (q_side + 2 * key_side) if case.backward else 0)
    statistics = (2 * each if case.backward else each) * case.batch * case.heads * case.queries
    return inputs_mib(case) + (outputs * _width(case) + statistics * max(4, _width(case))) / 2**20


def reduced(case: Case, longest: int = REDUCED_LENGTH) -> Case:
    """A case small enough for dense float64: the same head dim, dtype and mask, two batches and key heads at most, one
    of each where `longest`, a multiple of 128, is more than usual.

    Lengths keep their remainder by 128, so that a ragged edge is still one.
    """
    group, most = case.heads // case.kv_heads, 2 if longest == REDUCED_LENGTH else 1
    kv_heads = min(case.kv_heads, most)
    return dataclasses.replace(
        case,
        batch=min(case.batch, most),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=_reduced_length(case.queries, longest),
        keys=_reduced_length(case.keys, longest),
    )


def _make_mask(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    shape = (case.queries, case.keys)
    keep = torch.rand(shape, generator=generator, device=device) < KEPT
    keep[:, 0] = True  # every query has a key, also under a causal mask
    if case.mask == "empty-rows":
        keep[::3] = False
    if case.mask != "additive":
        return keep
    bias = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])
    return bias.masked_fill_(~keep, -torch.inf)


def _mask_bytes(case: Case) -> int:
    width = {"none": 0, "additive": _width(case)}.get(case.mask, 1)
    return width * case.queries * case.keys


def _reduced_length(length: int, longest: int) -> int:
    if length <= longest:
        return length
    return longest if length % 128 == 0 else longest - 128 + length % 128


def _element_counts(case: Case) -> tuple[int, int]:
    """Elements of one query-side and of one key-side tensor."""
    rows = case.batch * (case.head_dim + case.width) // 2
    return rows * case.heads * case.queries, rows * case.kv_heads * case.keys


def _width(case: Case) -> int:
    """Bytes an element."""
    return DTYPES[case.dtype].itemsize
