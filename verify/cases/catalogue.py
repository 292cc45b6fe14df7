"""The cases that are verified: a fixed list over all features of attention, and random ones."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from .case import COTANGENT_SUBSETS, TANGENT_SUBSETS, Case, Layout, MaskKind, MaskShape


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
    for d, dv in (*((d, d) for d in (1, 40, 72, 80, 96, 128, 256)), (64, 24), (24, 72), (1, 33), (128, 64)):
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
        Case("mqa_dims_192_causal", **line | {"q_heads": 3, "m": 70, "n": 150, "d": 192, "dv": 192}, is_causal=True),
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


def _additive_masks() -> list[Case]:
    """Of head dims that a GPU may have other kernels for."""
    line: dict[str, Any] = {"batch": (), "q_heads": 1, "kv_heads": 1}
    plain: dict[str, Any] = {"tangents": (), "cotangents": ("o",)}
    return [
        Case("mask_dims_64_additive", **line | {"m": 130, "n": 150, "d": 64, "dv": 64}, mask="additive"),
        Case(
            "mask_dims_64_additive_plain", **line | {"m": 70, "n": 160, "d": 64, "dv": 64}, mask="additive",
            mask_shape="empty_rows", **plain,
        ),
        Case("mask_dims_72_float32", **line | {"m": 70, "n": 144, "d": 72, "dv": 72}, mask="additive_float32"),
        Case(
            "mask_dims_128_additive", **line | {"m": 140, "n": 160, "d": 128, "dv": 128}, mask="additive",
            mask_shape="per_key",
        ),
        Case(
            "mask_dims_128_causal", **line | {"m": 70, "n": 141, "d": 128, "dv": 128}, mask="additive", is_causal=True,
        ),
    ]  # fmt: skip


def _masks_of_wide_heads() -> list[Case]:
    """Likewise of head dims above 128."""
    line: dict[str, Any] = {"batch": (), "q_heads": 1, "kv_heads": 1}
    of_160, of_192, of_256 = ({**line, "d": d, "dv": d} for d in (160, 192, 256))
    return [
        Case("mask_dims_160", **of_160, m=70, n=150, mask="bool"),
        Case("mask_dims_192_causal", **of_192, m=140, n=150, mask="bool", is_causal=True),
        Case("mask_dims_256_empty_rows", **of_256, m=70, n=90, mask="bool", mask_shape="empty_rows"),
        Case("mask_dims_160_additive", **of_160, m=70, n=144, mask="additive"),
        Case("mask_dims_192_float32", **of_192, m=70, n=141, mask="additive_float32", mask_shape="empty_rows"),
        Case("mask_dims_256_additive_causal", **of_256, m=70, n=90, mask="additive", is_causal=True),
    ]


def _low_scores() -> list[Case]:
    """The zeros that stand for keys beyond the end would have the largest weights."""
    line: dict[str, Any] = {"batch": (), "q_heads": 1, "kv_heads": 1, "kind": "low_scores"}
    return [
        Case("low_scores", n=77, kind="low_scores"),
        Case("low_scores_causal", **line, m=130, n=70, d=72, dv=72, is_causal=True),
        Case("low_scores_mask", **line, m=33, n=40, d=16, dv=16, mask="bool"),
        Case("low_scores_plain", **line, m=64, n=77, tangents=(), cotangents=("o",)),
    ]


def _edges() -> list[Case]:
    """Nothing to sum over, rows that start anywhere over several tiles of keys, head dims that kernels do not serve."""
    one: dict[str, Any] = {"batch": (), "q_heads": 1, "kv_heads": 1}
    layouts: tuple[Layout, ...] = ("expanded", "padded", "column_major")
    unaligned = ((33, 16), (49, 24), (63, 63), (100, 100))
    return [
        *(Case(f"unaligned_{d}_{dv}", **one, m=130, n=150, d=d, dv=dv) for d, dv in unaligned),
        # What a GPU may copy before its kernels read it.
        Case("unaligned_dims_130", **one, m=40, n=70, d=130, dv=130),
        Case("unaligned_mask", **one, m=40, n=70, d=36, dv=44, mask="bool"),
        Case("unaligned_plain", **one, m=40, n=70, d=100, dv=100, tangents=(), cotangents=("o",)),
        Case("unaligned_cotangent_o", **one, m=40, n=70, d=36, dv=36, cotangents=("o",)),
        *(
            Case(f"layout_dims_64_{layout}", **one | {"batch": (2,)}, m=40, n=48, d=64, dv=64, layout=layout)
            for layout in layouts
        ),
        Case("lengths_0_33", **one, m=0, n=33),
        Case("lengths_33_0", **one, m=33, n=0),
        Case("causal_33_0", **one, m=33, n=0, is_causal=True),
        Case("mask_additive_no_keys", n=0, mask="additive", mask_shape="matrix"),
        Case("dims_512_512", **one, m=40, n=48, d=512, dv=512),
        Case("dims_8_300", **one, m=40, n=48, d=8, dv=300),
    ]


CASES = [*_cases(), *_additive_masks(), *_masks_of_wide_heads(), *_low_scores(), *_edges()]


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
        kind=choose(("normal", "large_mu", "one_hot", "constant_keys", "low_scores", "zeros")),
    )  # fmt: skip


def random_case(rng: random.Random) -> Case:
    """A random case: any shapes, masks, layouts, tangents and kinds of numbers."""
    return draw_case(rng.choice)
