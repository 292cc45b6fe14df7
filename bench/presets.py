"""The lists of shapes that `--preset` names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .cases import Case

EVERY_MODE = ("fwd", "bwd", "fwd+bwd")
WITH_PLAIN = (*EVERY_MODE, "plain-fwd", "plain-bwd")
DIT_TOKENS = 32768  # of a batch: 8 sequences of 4096, 32 of 1024
DIT_LARGEST_BATCH = 64
COVERED_DIMS = sorted({*range(8, 257, 8), 1, 36, 100, 130, 255})


@dataclass(frozen=True)
class Entry:
    """One shape of a preset and the modes that it is measured in."""

    shape: Case
    modes: tuple[str, ...] = EVERY_MODE


@dataclass(frozen=True)
class Preset:
    """A list of shapes, given the kind of device, and the providers that are compared unless others are named.

    `together`: on a GPU these providers share one process, shape by shape, so that many small cells do not wait for as
    many processes, and a sweep that ends early has every provider on what it measured.
    """

    description: str
    entries: Callable[[str], list[Entry]]
    providers: tuple[str, ...] = ("flashjvp", "math", "plain", "finite-difference", "math-compiled")
    together: bool = False


def _shape(batch: int, heads: int, tokens: int, head_dim: int, dtype: str = "bfloat16") -> Case:
    return Case(
        mode="fwd",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        queries=tokens,
        keys=tokens,
        head_dim=head_dim,
        dtype=dtype,
        causal=False,
    )


def _paper(device: str) -> list[Entry]:
    return [Entry(_shape(1, heads, 2**power, 128)) for heads in (1, 24) for power in range(7, 16)]


def _dit(device: str) -> list[Entry]:
    return list(dict.fromkeys(_dit_entries()))


def _dit_entries() -> Iterator[Entry]:
    """DiT-XL's attention at four resolutions, then single shapes and the variants that are judged against them."""
    for heads, head_dim in ((18, 64), (16, 72)):
        for tokens in (256, 1024, 4096, 16384):
            shape = _shape(min(DIT_TOKENS // tokens, DIT_LARGEST_BATCH), heads, tokens, head_dim)
            yield Entry(shape, WITH_PLAIN if (tokens, head_dim) == (1024, 64) else EVERY_MODE)
    yield Entry(_shape(8, 16, 4096, 64))  # D = 72 is compared with it
    yield Entry(_shape(1, 24, 1024, 128))
    for head_dim in (64, 128):
        long = _shape(1, 24, 8192, head_dim)
        yield Entry(long, WITH_PLAIN)
        yield Entry(replace(long, causal=True))
        yield Entry(replace(long, mask="bool"))
    yield Entry(replace(_shape(8, 18, 4096, 64), causal=True))
    yield Entry(replace(_shape(8, 18, 4096, 64), mask="bool"))
    yield Entry(replace(_shape(1, 24, 8192, 128), kv_heads=8))
    yield Entry(_shape(1, 24, 8192, 128, "float16"))
    yield Entry(_shape(1, 24, 4096, 128, "float32"))


def _quick(device: str) -> list[Entry]:
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [Entry(_shape(1, 2, tokens, 64, dtype)) for tokens in (128, 512)]


def _coverage(device: str) -> list[Entry]:
    """Every head dim, then every other difference between calls at a few of them; the longest calls last."""
    half = "bfloat16" if device == "cuda" else "float32"
    shapes = [_shape(2, 16, 4096, head_dim, half) for head_dim in COVERED_DIMS]
    others = ({"dtype": "float16"}, {"dtype": "float32"}, {"causal": True}, {"mask": "bool"}, {"mask": "additive"})
    grouped = ({"kv_heads": 4}, {"kv_heads": 1})
    for head_dim in (40, 64, 72, 96, 128, 160, 192, 256):
        at = _shape(2, 16, 4096, head_dim, half)
        shapes += [replace(at, **change) for change in (*others, *grouped)]
    for head_dim, value_dim in ((64, 128), (128, 64), (72, 64), (192, 128), (256, 64)):
        shapes.append(replace(_shape(2, 16, 4096, head_dim, half), value_dim=value_dim))
    for head_dim in (64, 128):
        at = _shape(2, 16, 4096, head_dim, half)
        shapes += [replace(at, tangents=names) for names in ("q", "k", "v", "qk", "qv", "kv")]
        shapes += [replace(at, cotangents=name) for name in ("o", "o_t")]
    for tokens in (2**power for power in range(4, 18)):
        batch = max(1, min(DIT_LARGEST_BATCH, DIT_TOKENS // tokens))
        shapes += [_shape(batch, 16, tokens, head_dim, half) for head_dim in (64, 128)]
    return [Entry(shape, ("fwd", "bwd")) for shape in dict.fromkeys(shapes)]


def _card(device: str) -> list[Entry]:
    half = "bfloat16" if device == "cuda" else "float32"
    shapes = [_shape(1, 8, tokens, head_dim, half) for head_dim in (64, 72, 128, 256) for tokens in (512, 4096)]
    shapes += [_shape(1, 8, 4096, 64, dtype) for dtype in ("float16", "float32")]
    shapes += [replace(shapes[1], **option) for option in ({"causal": True}, {"mask": "bool"}, {"kv_heads": 2})]
    return [Entry(shape, WITH_PLAIN) for shape in dict.fromkeys(shapes)]


PRESETS = {
    "paper": Preset("heads 1 and 24, 128 to 32768 tokens, head dim 128, bfloat16", _paper),
    "dit": Preset(
        "DiT-XL: head dims 64 (18 heads) and 72 (16 heads), 256 to 16384 tokens, bfloat16; and causal, masked, grouped "
        "and other types at single shapes",
        _dit,
    ),
    "coverage": Preset(
        "every head dim 8 to 256 in steps of 8, and odd ones; other value dims, types, masks, groups, subsets of "
        "tangents and cotangents; 16 to 131072 tokens: where flashjvp is far from plain attention",
        _coverage,
        ("flashjvp", "plain"),
        together=True,
    ),
    "card": Preset("what `make measure-this-gpu` measures: 13 shapes", _card, ("flashjvp", "plain")),
    "quick": Preset("two small shapes, within a minute", _quick, ("flashjvp", "math", "plain")),
}
