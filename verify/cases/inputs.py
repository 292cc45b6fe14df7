"""The tensors of a case: its inputs, tangents, cotangents and mask, in the memory layouts that it asks for.

Nothing here knows how attention is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from .case import Case, Layout


@dataclass(frozen=True)
class Inputs:
    """The tensors and options of one call; None where a tangent, a cotangent or the mask is absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor | None = None
    k_t: Tensor | None = None
    v_t: Tensor | None = None
    mask: Tensor | None = None
    d_o: Tensor | None = None
    d_o_t: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def c(self) -> float:
        """The softmax scale."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def has_tangent(self) -> bool:
        return any(x is not None for x in (self.q_t, self.k_t, self.v_t))

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same call with every tensor x replaced by f(x)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: f(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **changed)

    def group(self, batch: tuple[int, ...], kv_head: int) -> Self:
        """The part of the call that belongs to one key head of one batch element. Big results are judged in parts."""
        rank, q_heads, kv_heads = self.q.ndim, self.q.shape[-3], self.k.shape[-3]

        def part(x: Tensor) -> Tensor:
            x = x[(None,) * (rank - x.ndim)]  # a mask may have fewer dims
            return group_of(x, batch, kv_head, q_heads // kv_heads if x.shape[-3] == q_heads else 1)

        return self.map(part)


def group_of(x: Tensor, batch: tuple[int, ...], kv_head: int, heads: int) -> Tensor:
    """x [*batch, H, rows, width] at one batch element and at the `heads` heads of a key head. Dims of 1 are kept."""
    for dim, index in enumerate(batch):
        x = x.narrow(dim, index if x.shape[dim] > 1 else 0, 1)
    return x if x.shape[-3] == 1 else x.narrow(-3, kv_head * heads, heads)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of a case. On one kind of device a seed gives the same numbers, rounded to `dtype`."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int, length: int, width: int) -> Tensor:
        shape = (*case.batch, heads, length, width)
        values = torch.empty(shape, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return values.normal_(generator=generator).to(dtype)

    sizes = {"q": (case.q_heads, case.m, case.d), "k": (case.kv_heads, case.n, case.d)}
    sizes |= {"v": (case.kv_heads, case.n, case.dv), "o": (case.q_heads, case.m, case.dv)}
    primals = {x: normal(*sizes[x]) for x in "qkv"}
    tangents = {x: normal(*sizes[x]) for x in "qkv"}
    cotangents = {x: normal(*sizes["o"]) for x in ("o", "o_t")}
    _shape_numbers(case, primals, tangents)
    q, k, v = _pack(*primals.values()) if case.layout == "packed" else (place(x, case.layout) for x in primals.values())
    t = {x: place(tangents[x], case.tangent_layout) for x in case.tangents}
    d = {x: place(cotangents[x], case.layout) for x in case.cotangents}
    mask = _make_mask(case, dtype, device, generator)
    return Inputs(
        q, k, v, t.get("q"), t.get("k"), t.get("v"), mask, d.get("o"), d.get("o_t"), case.is_causal, case.scale
    )  # fmt: skip


def _shape_numbers(case: Case, primals: dict[str, Tensor], tangents: dict[str, Tensor]) -> None:
    """Turns standard normal numbers into the kind of numbers that the case names."""
    if case.magnitude != 1.0:
        # q . k of standard normal vectors is of size sqrt(d), which the default scale takes away
        scale = case.d**-0.5 if case.scale is None else case.scale
        factor = (case.magnitude / abs(scale * case.d**0.5)) ** 0.5
        primals["q"] *= factor
        primals["k"] *= factor
    if case.kind == "large_mu":  # S_t = c q . k_t is 100 times larger than its spread over the keys
        tangents["k"] += 100.0 * tangents["k"][..., :1, :]
    elif case.kind == "one_hot":  # query m points along key m mod N: a gap of about 4 sqrt(d) to the other scores
        rows = torch.arange(case.m, device=primals["q"].device) % case.n
        keys = primals["k"].repeat_interleave(case.q_heads // case.kv_heads, dim=-3)
        primals["q"] = 4.0 * keys[..., rows, :]
    elif case.kind == "constant_keys":
        primals["k"] = primals["k"][..., :1, :].expand_as(primals["k"]).clone()
    elif case.kind == "low_scores" and case.d > 0:  # all near -200: exp(-lse) overflows, and a key of zeros would win
        scale = case.d**-0.5 if case.scale is None else case.scale
        root = (200.0 / abs(scale)) ** 0.5
        primals["k"][..., 0] = root
        primals["q"][..., 0] = -root if scale > 0 else root
    elif case.kind == "zeros":
        for x in primals:
            primals[x] = torch.zeros_like(primals[x])


def place(x: Tensor, layout: Layout) -> Tensor:
    """The values of x [*batch, H, L, width] in memory of the named layout.

    'expanded' repeats the first slice. 'padded' has NaN around every head and row, so reading beyond a tensor shows.
    """
    if layout in ("sequence_major", "packed"):
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "padded":
        return torch.nn.functional.pad(x, (3, 5, 1, 2), value=torch.nan)[..., 1 : x.shape[-2] + 1, 3 : x.shape[-1] + 3]
    if layout == "column_major":
        return x.mT.contiguous().mT
    if layout == "expanded":
        return x.narrow(0, 0, min(1, x.shape[0])).expand_as(x)
    return x


def _pack(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Views q, k, v [*batch, H, L, D] of one [*batch, L, 3, H, D] tensor, as a fused projection makes them."""
    qkv = torch.stack([x.transpose(-2, -3) for x in (q, k, v)], dim=-3)
    return [x.transpose(-2, -3) for x in qkv.unbind(-3)]


def _make_mask(case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    ones = (1,) * len(case.batch)
    shape = {
        "full": (*case.batch, case.q_heads, case.m, case.n),
        "empty_rows": (*case.batch, case.q_heads, case.m, case.n),
        "per_key": (*ones, 1, 1, case.n),
        "per_row": (*ones, 1, case.m, 1),
        "per_head": (*ones, case.q_heads, case.m, case.n),
        "per_batch": (*case.batch, 1, 1, case.n),
        "matrix": (case.m, case.n),
    }[case.mask_shape]
    keep = torch.rand(shape, device=device, generator=generator) < 0.7
    if shape[-1] > 1 and case.mask_shape != "empty_rows":
        keep[..., 0] = True  # no accidental empty rows: a case that wants them says so
    if case.mask_shape == "empty_rows":
        keep[..., ::3, :] = False
    if case.mask == "bool":
        return keep
    kept_type = torch.float32 if case.mask == "additive_float32" else dtype
    bias = torch.empty(shape, device=device, dtype=torch.float32).normal_(generator=generator)
    return bias.masked_fill(~keep, -torch.inf).to(kept_type)
