"""The feature matrix of attention as data: what a case is, the fixed list of cases, random ones, and their tensors.

Nothing here knows how attention is computed: oracles.py runs a case's tensors, tolerance.py judges the results.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

MaskKind = Literal["bool", "additive", "additive_float32"]
MaskShape = Literal["full", "per_key", "per_row", "per_head", "per_batch", "matrix", "empty_rows"]
Layout = Literal["contiguous", "packed", "sequence_major", "expanded", "padded", "column_major"]
Kind = Literal["normal", "large_mu", "one_hot", "constant_keys", "zeros"]

TANGENT_SUBSETS: tuple[tuple[str, ...], ...] = (
    ("q", "k", "v"),
    ("q",),
    ("k",),
    ("v",),
    ("q", "k"),
    ("q", "v"),
    ("k", "v"),
    (),
)
COTANGENT_SUBSETS: tuple[tuple[str, ...], ...] = (("o", "o_t"), ("o",), ("o_t",))


@dataclass(frozen=True)
class Case:
    """One call of attention: shapes, options and the character of the numbers, but no tensors yet.

    `batch` are the leading dims; `tangents` names the inputs that have one and `cotangents` the outputs that have one
    (no tangents: plain attention, whose only output is o). `magnitude` is the typical size of a score.
    """

    name: str
    batch: tuple[int, ...] = (2,)
    q_heads: int = 2
    kv_heads: int = 2
    m: int = 64
    n: int = 64
    d: int = 32
    dv: int = 32
    mask: MaskKind | None = None
    mask_shape: MaskShape = "full"
    is_causal: bool = False
    scale: float | None = None
    layout: Layout = "contiguous"
    tangent_layout: Layout = "contiguous"
    tangents: tuple[str, ...] = ("q", "k", "v")
    cotangents: tuple[str, ...] = ("o", "o_t")
    magnitude: float = 1.0
    kind: Kind = "normal"

    def __post_init__(self) -> None:
        if not self.tangents and self.cotangents != ("o",):
            raise ValueError(f"case {self.name}: without tangents the cotangents must be ('o',), got {self.cotangents}")
        if self.layout == "packed" and (self.q_heads, self.m, self.d) != (self.kv_heads, self.n, self.dv):
            raise ValueError(f"case {self.name}: packed needs q, k and v of one shape")

    def __str__(self) -> str:
        return self.name


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
        """The part of the call that concerns one key head of one batch element: big results are judged by parts."""
        rank, q_heads, kv_heads = self.q.ndim, self.q.shape[-3], self.k.shape[-3]

        def part(x: Tensor) -> Tensor:
            x = x[(None,) * (rank - x.ndim)]  # a mask may have fewer dims
            return group_of(x, batch, kv_head, q_heads // kv_heads if x.shape[-3] == q_heads else 1)

        return self.map(part)


def group_of(x: Tensor, batch: tuple[int, ...], kv_head: int, heads: int) -> Tensor:
    """x [*batch, H, rows, width] at one batch element and at the `heads` heads of a key head, dims of 1 kept whole."""
    for dim, index in enumerate(batch):
        x = x.narrow(dim, index if x.shape[dim] > 1 else 0, 1)
    return x if x.shape[-3] == 1 else x.narrow(-3, kv_head * heads, heads)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of a case: the same numbers, up to the rounding to `dtype`, for a seed on one kind of device."""
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
    """Gives standard normal numbers the character that the case names."""
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
    elif case.kind == "zeros":
        for x in primals:
            primals[x] = torch.zeros_like(primals[x])


def place(x: Tensor, layout: Layout) -> Tensor:
    """The values of x [*batch, H, L, width] in memory of the named layout.

    'expanded' repeats the first slice, 'padded' has NaN around every head and row: reading beyond a tensor shows.
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


def _cases() -> list[Case]:
    small: dict[str, Any] = {"batch": (1,), "m": 33, "n": 40, "d": 16, "dv": 16}
    plain: dict[str, Any] = {"tangents": (), "cotangents": ("o",)}
    line: dict[str, Any] = {"batch": (), "q_heads": 1, "kv_heads": 1, "d": 16, "dv": 16}
    masks: tuple[MaskKind, ...] = ("bool", "additive", "additive_float32")
    mask_shapes: tuple[MaskShape, ...] = (
        "full", "per_key", "per_row", "per_head", "per_batch", "matrix", "empty_rows",
    )  # fmt: skip
    layouts: tuple[Layout, ...] = ("sequence_major", "expanded", "padded", "column_major")
    cases = [Case("square"), Case("plain", **plain)]
    for d, dv in ((1, 1), (40, 40), (72, 72), (80, 80), (96, 96), (128, 128), (256, 256), (64, 24), (24, 72), (1, 33)):
        cases.append(Case(f"dims_{d}_{dv}", batch=(1,), q_heads=1, kv_heads=1, m=40, n=48, d=d, dv=dv))
    for m, n in ((1, 1), (1, 31), (31, 1), (257, 33), (33, 257), (1, 1000), (1000, 1), (65, 64), (80, 31)):
        cases.append(Case(f"lengths_{m}_{n}", **line, m=m, n=n))
    for m, n in ((64, 64), (33, 80), (80, 33), (1, 31), (31, 1), (257, 65)):
        cases.append(Case(f"causal_{m}_{n}", **line, m=m, n=n, is_causal=True))
    for kind in masks:
        for shape in mask_shapes if kind != "additive_float32" else ("full", "matrix"):
            cases.append(Case(f"mask_{kind}_{shape}", **small | {"batch": (2,)}, mask=kind, mask_shape=shape))
    cases += [
        Case("mask_plain_empty_rows", **small, mask="bool", mask_shape="empty_rows", **plain),
        Case("mask_causal", **small, mask="bool", is_causal=True),
        Case("mask_causal_additive", **small, mask="additive", mask_shape="matrix", is_causal=True),
        # Masks whose rows start and end at multiples of 16 elements are read by wide loads.
        Case("mask_bool_aligned", **small | {"m": 70, "n": 80}, mask="bool"),
        Case("mask_additive_aligned", **small | {"m": 70, "n": 80}, mask="additive", mask_shape="matrix"),
        Case("mask_aligned_per_batch", **small | {"batch": (2,), "n": 80}, mask="bool", mask_shape="per_batch"),
        Case("mask_aligned_causal", **small | {"m": 70, "n": 80}, mask="bool", is_causal=True),
        Case("mask_gqa_per_head", **small, q_heads=4, kv_heads=2, mask="bool", mask_shape="per_head"),
        # Head dims that a GPU may have other kernels for, and masks whose rows start anywhere.
        Case("mask_dims_64", **line | {"m": 130, "n": 150, "d": 64, "dv": 64}, mask="bool"),
        Case("mask_dims_64_plain", **line | {"m": 70, "n": 150, "d": 64, "dv": 64}, mask="bool", **plain),
        Case(
            "mask_dims_72_per_key", **line | {"m": 70, "n": 141, "d": 72, "dv": 72}, mask="bool", mask_shape="per_key"
        ),
        Case("mask_dims_128_aligned", **line | {"m": 70, "n": 160, "d": 128, "dv": 128}, mask="bool"),
        Case("mqa_dims_64_causal", **line | {"q_heads": 3, "m": 140, "n": 150, "d": 64, "dv": 64}, is_causal=True),
        Case("gqa", q_heads=6, kv_heads=2, m=40, n=33, d=16, dv=24),
        Case("mqa_causal", q_heads=3, kv_heads=1, m=40, n=40, d=16, dv=16, is_causal=True),
        Case("gqa_plain", **small, q_heads=4, kv_heads=2, **plain),
        Case("gqa_short", **small | {"m": 9, "n": 12, "dv": 8}, kv_heads=1, mask="additive", mask_shape="matrix"),
        Case("batch_none", **small | {"batch": ()}),
        Case("batch_many", **small | {"batch": (2, 1, 3), "m": 17, "n": 19}, q_heads=1, kv_heads=1, mask="bool"),
        Case("batch_empty", **small | {"batch": (0,)}),
        Case("batch_empty_inner", **small | {"batch": (2, 0)}),
        Case("scale_half", **small, scale=0.5),
        Case("scale_negative", **small, scale=-0.3),
        Case("packed", m=40, n=40, layout="packed", tangent_layout="packed"),
        Case("packed_plain", m=40, n=40, d=24, dv=24, layout="packed", **plain),
        Case("packed_causal_padded_tangents", m=65, n=65, layout="packed", tangent_layout="padded", is_causal=True),
        Case("tangents_expanded", **small | {"batch": (2,)}, tangent_layout="expanded"),
        # The tiled backend streams over keys only beyond 2048 of them.
        Case("lengths_512_2100", batch=(), q_heads=1, kv_heads=1, m=512, n=2100, d=8, dv=8),
    ]
    cases += [Case(f"layout_{layout}", **small | {"batch": (2,)}, layout=layout) for layout in layouts]
    for tangents in TANGENT_SUBSETS[1:-1]:
        cases.append(Case("tangents_" + "".join(tangents), **small, tangents=tangents))
    for tangents in TANGENT_SUBSETS[:4]:
        for cotangents in COTANGENT_SUBSETS[1:]:
            name = f"cotangent_{cotangents[0]}_tangents_{''.join(tangents)}"
            cases.append(Case(name, **small, tangents=tangents, cotangents=cotangents))
    cases += [
        Case("scores_30", **small, magnitude=30.0),
        Case("scores_1e4", **small | {"batch": (2,)}, magnitude=1e4),
        Case("scores_1e4_causal", **line, m=64, n=64, magnitude=1e4, is_causal=True),
        Case("scores_1e4_mask", **small, magnitude=1e4, mask="bool", mask_shape="empty_rows"),
        Case("large_mu", kind="large_mu"),
        Case("large_mu_long", **line, m=33, n=257, kind="large_mu"),
        Case("large_mu_causal", **line, m=64, n=64, kind="large_mu", is_causal=True),
        Case("one_hot", kind="one_hot"),
        Case("one_hot_causal", **line, m=64, n=64, kind="one_hot", is_causal=True),
        Case("one_hot_one_row", **line, m=1, n=80, kind="one_hot"),
        Case("constant_keys", kind="constant_keys"),
        Case("constant_keys_causal", **line, m=64, n=77, kind="constant_keys", is_causal=True),
        Case("constant_keys_tangent_q", **small, kind="constant_keys", tangents=("q",)),
        Case("zeros", kind="zeros"),
        Case("zeros_odd", **line, m=31, n=77, kind="zeros"),
    ]
    return cases


CASES = _cases()


def draw_case(choose: Callable[[Sequence[Any]], Any], name: str = "random") -> Case:
    """A case whose every property is chosen from a short list, simplest first, by `choose(options)`."""
    batch = choose(((), (1,), (2,), (2, 1, 2), (0,)))
    q_heads, kv_heads = choose(((1, 1), (2, 2), (2, 1), (4, 2), (3, 1)))
    m, n = choose((1, 7, 16, 31, 33, 64, 70)), choose((1, 7, 16, 31, 33, 64, 70))
    d, dv = choose((1, 8, 16, 24, 33, 40)), choose((1, 8, 16, 24, 33, 40))
    layout = choose(("contiguous", "packed", "sequence_major", "expanded", "padded", "column_major"))
    if layout == "packed":
        kv_heads, n, dv = q_heads, m, d
    tangents = choose(TANGENT_SUBSETS)
    mask = choose((None, "bool", "additive", "additive_float32"))
    mask_shape = choose(("full", "per_key", "per_row", "per_head", "per_batch", "matrix", "empty_rows"))
    return Case(
        name, batch, q_heads, kv_heads, m, n, d, dv,
        mask=mask,
        mask_shape=mask_shape if mask else "full",
        is_causal=choose((False, True)),
        scale=choose((None, 0.5, -0.3)),
        layout=layout,
        tangent_layout=choose(("contiguous", "sequence_major", "padded", "expanded")),
        tangents=tangents,
        cotangents=choose(COTANGENT_SUBSETS) if tangents else ("o",),
        magnitude=choose((1.0, 10.0, 1e4)),
        kind=choose(("normal", "large_mu", "one_hot", "constant_keys", "zeros")),
    )  # fmt: skip


def random_case(rng: random.Random) -> Case:
    """A case drawn from the whole feature matrix."""
    return draw_case(rng.choice)
