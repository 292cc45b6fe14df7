"""What a row of `python -m bench.interleaved` is, and the table of such rows."""

from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from .tables import markdown


@dataclass(frozen=True, kw_only=True)
class InterleavedTiming:
    """One call, interleaved with a large matrix product.

    `mask` is one of reports.schema.MASKS; `products` is `ieee`, or `tf32` where float32 inputs are rounded for the
    tensor cores; `deterministic` is PyTorch's mode. Medians of the latency and of the product's rate;
    rates in TFLOP/s, counted as in reports.schema; `of_ceiling` is the call's rate over that of the product.
    """

    provider: str
    mode: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    head_dim: int
    mask: str
    dtype: str
    products: str
    deterministic: bool
    latency_ms: float
    tflops: float
    product_tflops: float
    of_ceiling: float
    machine: str
    torch_version: str
    triton_version: str
    commit: str


INTERLEAVED_COLUMNS = tuple(field.name for field in fields(InterleavedTiming))


def call_name(x: Any) -> str:
    """What was called: the mode and whatever sets the call of a row apart."""
    found = [x.mode]
    if x.kv_heads != x.heads:
        found.append(f"{x.kv_heads} key heads")
    if x.mask != "none":
        found.append(f"{x.mask} mask")
    if x.dtype != "bfloat16":
        found.append("TF32" if x.products == "tf32" else x.dtype)
    if x.deterministic:
        found.append("deterministic")
    return ", ".join(found)


def interleaved_table(data: pd.DataFrame) -> str:
    """A line for each call: `data` has the columns INTERLEAVED_COLUMNS, all rows of one run."""
    lines = []
    for row in data.itertuples():
        shape = f"{row.batch}, {row.heads}, {row.queries}, {row.head_dim}"
        numbers = (f"{row.latency_ms:.3g}", f"{row.tflops:.0f}", f"{row.product_tflops:.0f}", f"{row.of_ceiling:.2f}")
        lines.append([shape, call_name(row), row.provider, *numbers])
    first = data.iloc[0]
    heads = ["B, H, N, D", "call", "provider", "ms", "TFLOP/s", "matrix product, TFLOP/s", "of it"]
    source = f"{first['machine']}; torch {first['torch_version']}, triton {first['triton_version']}"
    return f"{markdown(heads, lines, left=3)}\n\n{source}, commit {first['commit']}. By `python -m bench.interleaved`."
