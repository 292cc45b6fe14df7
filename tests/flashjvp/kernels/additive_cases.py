"""Calls with additive masks that the warp-specialised kernels serve."""

from typing import Any

from verify.cases.case import Case

PLAIN: dict[str, Any] = {"tangents": (), "cotangents": ("o",)}
ADDITIVE = (
    Case("additive_64", batch=(2,), q_heads=2, kv_heads=2, m=200, n=150, d=64, dv=64, mask="additive"),
    Case("additive_128", batch=(1,), q_heads=1, kv_heads=1, m=130, n=300, d=128, dv=128, mask="additive"),
    Case("additive_72", batch=(1,), q_heads=2, kv_heads=1, m=150, n=133, d=72, dv=72, mask="additive"),
    Case("additive_96", batch=(1,), q_heads=1, kv_heads=1, m=70, n=128, d=96, dv=96, mask="additive",
         mask_shape="per_head"),
    Case("additive_float32_aligned", batch=(2,), q_heads=4, kv_heads=2, m=90, n=144, d=64, dv=64,
         mask="additive_float32", mask_shape="per_head"),
    Case("additive_causal_128", batch=(2,), q_heads=2, kv_heads=1, m=150, n=140, d=128, dv=128, mask="additive",
         mask_shape="matrix", is_causal=True),
    Case("additive_empty_rows", batch=(2,), q_heads=1, kv_heads=1, m=140, n=150, d=64, dv=64, mask="additive",
         mask_shape="empty_rows"),
    Case("additive_per_key_plain", batch=(2,), q_heads=1, kv_heads=1, m=140, n=200, d=128, dv=128, mask="additive",
         mask_shape="per_key", **PLAIN),
    Case("additive_per_batch_plain", batch=(2,), q_heads=2, kv_heads=1, m=130, n=160, d=64, dv=64,
         mask="additive_float32", mask_shape="per_batch", **PLAIN),
    Case("additive_causal_plain", batch=(1,), q_heads=1, kv_heads=1, m=200, n=130, d=72, dv=72, mask="additive",
         mask_shape="empty_rows", is_causal=True, **PLAIN),
)  # fmt: skip
