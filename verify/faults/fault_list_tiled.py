"""The planted bugs of the tiled backend, which is plain PyTorch."""

from .fault import Fault

TILED_BACKWARD, TILED_GRID = "backends/tiled_backward.py", "backends/tiled_grid.py"
TILED, TILED_PRODUCTS = "backends/tiled.py", "backends/tiled_products.py"

OF_TILED = [
    Fault(
        "key tiles centred on stale means", "tiled", TILED,
        ".addcmul_(acc_o, step, value=-1.0)", "", "lengths_512_2100",
    ),
    Fault("alpha dropped from l of tiled", "tiled", TILED, "l * alpha + p.sum", "l + p.sum", "lengths_512_2100"),
    Fault(
        "guard of empty rows of tiled dropped", "tiled", TILED_PRODUCTS,
        "x.masked_fill(x.isneginf(), 0.0)", "x", "mask_bool_empty_rows",
    ),
    Fault(
        "last key under the diagonal dropped", "tiled", TILED_GRID,
        "min(self.keys, rows.stop)", "min(self.keys, rows.stop - 1)", "causal_64_64",
    ),
    Fault(
        "d_k_t from q_t", "tiled", TILED_BACKWARD,
        "add_product_(d_k_t_n, dS_t.mT, q)", "add_product_(d_k_t_n, dS_t.mT, q_t)",
    ),
    Fault(
        "gradient without T v_t.T", "tiled", TILED_BACKWARD,
        "products_(B, (G, v_n), (T, v_t_n))", "products_(B, (G, v_n))",
    ),
]  # fmt: skip
