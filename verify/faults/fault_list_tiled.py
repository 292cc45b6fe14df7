"""The planted bugs of the tiled backend, which is plain PyTorch."""

from .fault import Fault

TILED_BACKWARD, TILED_GRID = "backends/tiled_backward.py", "backends/tiled_grid.py"
TILED, TILED_PRODUCTS = "backends/tiled.py", "backends/tiled_products.py"

OF_TILED = [
    Fault(
        "key tiles centred on stale means", "tiled", TILED, "acc_o_t.addcmul_",
        "acc_o_t.mul_(alpha)", "lengths_512_2100",
    ),
    Fault(
        "alpha dropped from l of tiled", "tiled", TILED, "l",
        "l = l + p.sum(-1, keepdim=True)", "lengths_512_2100",
    ),
    Fault(
        "guard of empty rows of tiled dropped", "tiled", TILED_PRODUCTS, "return x masked_fill",
        "return x", "mask_bool_empty_rows",
    ),
    Fault(
        "last key under the diagonal dropped", "tiled", TILED_GRID, "return _slices min",
        "return _slices(min(self.keys, rows.stop - 1) if self.is_causal else self.keys, self.tile_keys)",
        "causal_64_64",
    ),
    Fault("d_k_t from q_t", "tiled", TILED_BACKWARD, "add_product_", "add_product_(d_k_t_n, dS_t.mT, q_t)"),
    Fault("gradient without T v_t.T", "tiled", TILED_BACKWARD, "dS", "dS = products_(B, (G, v_n)).sub_(row_delta)"),
]  # fmt: skip
