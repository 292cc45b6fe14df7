"""Malformed and unsupported calls as data: how each differs from a good one, and what its error must say."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashjvp import ArgumentTypeError, ArgumentValueError, UnsupportedError

B, H, M, N, D = 2, 4, 6, 5, 8
VIEWS = {"aten::expand", "aten::unsqueeze", "aten::view", "aten::detach", "aten::transpose", "aten::alias"}


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def qkv(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v}


def good() -> dict[str, Any]:
    return qkv(x(B, H, M, D), x(B, H, N, D), x(B, H, N, D))


def of_mask(tangent: Any) -> dict[str, Any]:
    return {"attn_mask": x(M, N), "attn_mask_t": tangent}


def of_dtype(dtype: torch.dtype) -> Callable[[], dict[str, Any]]:
    return lambda: {name: value.to(dtype) for name, value in good().items()}


def quantised() -> Tensor:
    return torch.quantize_per_tensor(x(B, H, M, D), 0.1, 0, torch.qint8)


def nested() -> Tensor:
    return torch.nested.nested_tensor([x(H, M, D), x(H, M + 1, D)], layout=torch.strided)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([x(M, D), x(M + 1, D)], layout=torch.jagged)


@dataclass(frozen=True)
class Bad:
    """A call that differs from the good one by `change`, and what its error must say."""

    name: str
    change: Callable[[], dict[str, Any]]
    error: type[Exception]
    argument: str
    expected: str
    came: str


TYPE, VALUE, UNSUPPORTED = ArgumentTypeError, ArgumentValueError, UnsupportedError
BOTH = [
    # Python types
    Bad("q list", lambda: {"q": [[1.0]]}, TYPE, "q", "a tensor", "list"),
    Bad("k None", lambda: {"k": None}, TYPE, "k", "a tensor", "NoneType"),
    Bad("v float", lambda: {"v": 1.0}, TYPE, "v", "a tensor", "float"),
    Bad("mask list", lambda: {"attn_mask": [True]}, TYPE, "attn_mask", "a tensor", "list"),
    Bad("mask bool", lambda: {"attn_mask": True}, TYPE, "attn_mask", "a tensor", "bool"),
    Bad("causal int", lambda: {"is_causal": 1}, TYPE, "is_causal", "a bool", "int"),
    Bad("causal mask", lambda: {"is_causal": x(M, N)}, TYPE, "is_causal", "a bool", "Tensor"),
    Bad("gqa None", lambda: {"enable_gqa": None}, TYPE, "enable_gqa", "a bool", "NoneType"),
    Bad("scale str", lambda: {"scale": "0.1"}, TYPE, "scale", "a real number", "str"),
    Bad("scale bool", lambda: {"scale": True}, TYPE, "scale", "a real number", "bool"),
    Bad("scale complex", lambda: {"scale": 1j}, TYPE, "scale", "a real number", "complex"),
    Bad("scale vector", lambda: {"scale": torch.tensor([1.0])}, TYPE, "scale", "0-dim tensor", "shape [1]"),
    Bad("scale bool tensor", lambda: {"scale": torch.tensor(True)}, TYPE, "scale", "0-dim tensor", "torch.bool"),
    Bad("scale complex tensor", lambda: {"scale": torch.tensor(1j)}, TYPE, "scale", "0-dim tensor", "complex64"),
    Bad("scale device", lambda: {"scale": torch.tensor(1.0, device="meta")}, VALUE, "scale", "on the cpu", "meta"),
    Bad("scale gradient", lambda: {"scale": x(requires_grad=True)}, UNSUPPORTED, "scale", "no gradient", "=True"),
    Bad("scale array", lambda: {"scale": np.ones(1)}, TYPE, "scale", "a real number", "numpy.ndarray"),
    Bad("causal numpy", lambda: {"is_causal": np.bool_(True)}, TYPE, "is_causal", "a bool", "bool(is_causal)"),
    Bad("causal 0-dim", lambda: {"is_causal": torch.tensor(True)}, TYPE, "is_causal", "a bool", "bool(is_causal)"),
    Bad("gqa numpy", lambda: {"enable_gqa": np.bool_(True)}, TYPE, "enable_gqa", "a bool", "bool(enable_gqa)"),
    Bad("q numpy", lambda: {"q": np.ones((B, H, M, D))}, TYPE, "q", "a tensor", "torch.from_numpy"),
    Bad("q and query", lambda: {"query": x(B, H, M, D)}, TYPE, "query", "as q or as query", "both"),
    Bad("v and value", lambda: {"value": x(B, H, M, D)}, TYPE, "value", "as v or as value", "both"),
    Bad("no key", lambda: {"k": None, "query": None}, TYPE, "k", "a tensor", "not given"),
    Bad("layout int", lambda: {"layout": 1}, TYPE, "layout", "'bmhd'", "int"),
    Bad("layout None", lambda: {"layout": None}, TYPE, "layout", "'bmhd'", "NoneType"),
    Bad("layout name", lambda: {"layout": "bhdm"}, VALUE, "layout", "'bmhd'", "'bhdm'"),
    Bad("layout rank 2", lambda: {"layout": "bmhd", "k": x(N, D)}, VALUE, "k", "at least 3 dims", "[5, 8]"),
    Bad("layout other", lambda: {"layout": "bmhd"}, VALUE, "k", "as many as q", "rows and heads exchanged"),
    Bad(
        "rows before heads", lambda: qkv(x(B, M, H, D), x(B, N, H, D), x(B, N, H, D)),
        VALUE, "k", "as many as q", "rows and heads exchanged, which `layout` says",
    ),
    Bad(
        "rows before heads, gqa", lambda: {**qkv(x(B, M, H, D), x(B, N, H, D), x(B, N, H, D)), "enable_gqa": True},
        VALUE, "k", "divides the 6 heads", "rows and heads exchanged",
    ),
    Bad("scale nan", lambda: {"scale": float("nan")}, VALUE, "scale", "a finite number", "nan"),
    Bad("scale inf", lambda: {"scale": float("-inf")}, VALUE, "scale", "a finite number", "-inf"),
    Bad("scale too large", lambda: {"scale": 10**400}, VALUE, "scale", "a finite number", "float64 cannot hold"),
    Bad("scale of digits", lambda: {"scale": -(10**5000)}, VALUE, "scale", "a finite number", "float64 cannot hold"),
    Bad("scale fraction", lambda: {"scale": Fraction(10**400, 3)}, VALUE, "scale", "finite", "float64 cannot hold"),
    Bad("backend int", lambda: {"backend": 1}, TYPE, "backend", "'tiled'", "int"),
    Bad("backend name", lambda: {"backend": "cudnn"}, VALUE, "backend", "'tiled'", "'cudnn'"),
    # ranks and shapes
    Bad("q scalar", lambda: {"q": x()}, VALUE, "q", "at least 2 dims", "[]"),
    Bad("q vector", lambda: {"q": x(D)}, VALUE, "q", "at least 2 dims", f"[{D}]"),
    Bad("k vector", lambda: {"k": x(D)}, VALUE, "k", "at least 2 dims", f"[{D}]"),
    Bad("v scalar", lambda: {"v": x()}, VALUE, "v", "at least 2 dims", "[]"),
    Bad("k rank 3, other heads", lambda: {"k": x(3, N, D), "v": x(3, N, D)}, VALUE, "k", "as many as q", "[1, 3"),
    Bad("head dims", lambda: {"k": x(B, H, N, 9)}, VALUE, "k", "the head dim of q [2, 4, 6, 8], 8", "[2, 4, 5, 9]"),
    Bad("rows", lambda: {"v": x(B, H, 7, D)}, VALUE, "v", "as many rows as k [2, 4, 5, 8], 5", "[2, 4, 7, 8]"),
    Bad("one value row", lambda: {"v": x(B, H, 1, D)}, VALUE, "v", "as many rows as k", "[2, 4, 1, 8]"),
    Bad("k batch", lambda: {"k": x(3, H, N, D)}, VALUE, "k", "broadcast with q [2, 4, 6, 8]", "[3, 4, 5, 8]"),
    Bad("k no batch", lambda: {"k": x(0, H, N, D)}, VALUE, "k", "broadcast with q [2, 4, 6, 8]", "[0, 4, 5, 8]"),
    Bad("v batch", lambda: {"v": x(3, H, N, D)}, VALUE, "v", "those of q and k, [2]", "[3, 4, 5, 8]"),
    Bad("v batch against k", lambda: {"q": x(1, H, M, D), "v": x(3, H, N, D)}, VALUE, "v", "q and k, [2]", "[3, 4"),
    # heads
    Bad("k heads", lambda: {"k": x(B, 2, N, D), "v": x(B, 2, N, D)}, VALUE, "k", "as many as q [2, 4, 6, 8]", "[2, 2"),
    Bad("v heads", lambda: {"v": x(B, 2, N, D)}, VALUE, "v", "as many as k [2, 4, 5, 8], 4", "[2, 2, 5, 8]"),
    Bad("v heads, k of 1", lambda: {"k": x(B, 1, N, D), "v": x(B, 3, N, D)}, VALUE, "v", "as many as q", "[2, 3"),
    Bad(
        "gqa not divisible", lambda: {"k": x(B, 3, N, D), "v": x(B, 3, N, D), "enable_gqa": True},
        VALUE, "k", "divides the 4 heads of q [2, 4, 6, 8]", "[2, 3, 5, 8]",
    ),
    Bad(
        "gqa more keys", lambda: {"k": x(B, 8, N, D), "v": x(B, 8, N, D), "enable_gqa": True},
        VALUE, "k", "divides the 4 heads", "[2, 8, 5, 8]",
    ),
    Bad(
        "gqa no keys", lambda: {"k": x(B, 0, N, D), "v": x(B, 0, N, D), "enable_gqa": True},
        VALUE, "k", "divides the 4 heads", "[2, 0, 5, 8]",
    ),
    Bad(
        "gqa v heads", lambda: {"k": x(B, 2, N, D), "v": x(B, 3, N, D), "enable_gqa": True},
        VALUE, "v", "divides the 4 heads", "[2, 3, 5, 8]",
    ),
    # dtypes, devices, layouts
    Bad("int64", of_dtype(torch.int64), TYPE, "q", "torch.bfloat16", "torch.int64"),
    Bad("bool", of_dtype(torch.bool), TYPE, "q", "torch.bfloat16", "torch.bool"),
    Bad("complex64", of_dtype(torch.complex64), TYPE, "q", "torch.bfloat16", "torch.complex64"),
    Bad("float8", of_dtype(torch.float8_e4m3fn), TYPE, "q", "torch.bfloat16", "torch.float8_e4m3fn"),
    Bad("quantised", lambda: {"q": quantised()}, TYPE, "q", "torch.bfloat16", "torch.qint8"),
    Bad("k dtype", lambda: {"k": x(B, H, N, D).half()}, TYPE, "k", "the dtype of q, torch.float32", "torch.float16"),
    Bad("v dtype", lambda: {"v": x(B, H, N, D).double()}, TYPE, "v", "the dtype of q, torch.float32", "torch.float64"),
    Bad("k device", lambda: {"k": x(B, H, N, D, device="meta")}, VALUE, "k", "the device of q, cpu", "meta"),
    Bad("v device", lambda: {"v": x(B, H, N, D, device="meta")}, VALUE, "v", "the device of q, cpu", "meta"),
    Bad("sparse", lambda: {"q": x(B, H, M, D).to_sparse()}, UNSUPPORTED, "q", "torch.strided", "torch.sparse_coo"),
    Bad("sparse csr", lambda: {"k": x(N, D).to_sparse_csr()}, UNSUPPORTED, "k", "torch.strided", "torch.sparse_csr"),
    Bad("nested", lambda: {"v": nested()}, UNSUPPORTED, "v", "not nested", "nested tensor"),
    Bad("jagged", lambda: {"q": jagged()}, UNSUPPORTED, "q", "not nested", "attention_varlen takes it"),
    # masks
    Bad("mask keys", lambda: {"attn_mask": x(M, 4)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "[6, 4]"),
    Bad("mask rows", lambda: {"attn_mask": x(B, H, 5, N)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "[2, 4, 5, 5]"),
    Bad("mask [B, N]", lambda: {"attn_mask": x(B, N)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "attn_mask[:, None, None"),
    Bad("mask [B, M, N]", lambda: {"attn_mask": x(B, M, N)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "attn_mask[:, None] "),
    Bad("mask [B, 1, N]", lambda: {"attn_mask": x(B, 1, N)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "attn_mask[:, None] "),
    Bad("mask empty", lambda: {"attn_mask": x(M, 0)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "[6, 0]"),
    Bad("mask rank", lambda: {"attn_mask": x(1, B, H, M, N)}, VALUE, "attn_mask", "[2, 4, 6, 5]", "[1, 2, 4, 6, 5]"),
    Bad(
        "mask widens the batch",
        lambda: {**qkv(x(1, H, M, D), x(1, H, N, D), x(1, H, N, D)), "attn_mask": x(3, 1, M, N)},
        VALUE, "attn_mask", "[1, 4, 6, 5]", "[3, 1, 6, 5]",
    ),
    Bad(
        "mask of rank 3, q of rank 2", lambda: {**qkv(x(M, D), x(N, D), x(N, D)), "attn_mask": x(1, M, N)},
        VALUE, "attn_mask", "[6, 5]", "[1, 6, 5]",
    ),
    Bad("mask int", lambda: {"attn_mask": x(M, N).int()}, TYPE, "attn_mask", "torch.bool, torch.float32", "k.bool()"),
    Bad("mask half", lambda: {"attn_mask": x(M, N).half()}, TYPE, "attn_mask", "the dtype of q", "attn_mask.to("),
    Bad("mask double", lambda: {"attn_mask": x(M, N).double()}, TYPE, "attn_mask", "the dtype of q", "torch.float64"),
    Bad("mask device", lambda: {"attn_mask": x(M, N, device="meta")}, VALUE, "attn_mask", "the device of q", "meta"),
    Bad("mask sparse", lambda: {"attn_mask": x(M, N).to_sparse()}, UNSUPPORTED, "attn_mask", "strided", "sparse_coo"),
    # dropout
    Bad("dropout 1", lambda: {"dropout_p": 1.01}, VALUE, "dropout_p", "[0, 1]", "1.01"),
    Bad("dropout negative", lambda: {"dropout_p": -0.5}, VALUE, "dropout_p", "[0, 1]", "-0.5"),
    Bad("dropout nan", lambda: {"dropout_p": float("nan")}, VALUE, "dropout_p", "[0, 1]", "nan"),
    Bad("dropout digits", lambda: {"dropout_p": 10**5000}, VALUE, "dropout_p", "[0, 1]", "float64 cannot hold"),
    Bad("dropout None", lambda: {"dropout_p": None}, TYPE, "dropout_p", "a real number", "NoneType"),
    Bad("dropout vector", lambda: {"dropout_p": torch.zeros(1)}, TYPE, "dropout_p", "0-dim tensor", "shape [1]"),
    Bad("dropout gradient", lambda: {"dropout_p": x(requires_grad=True)}, UNSUPPORTED, "dropout_p", "gradient", "True"),
]  # fmt: skip
JVP_ONLY = [
    Bad("q_t bool", lambda: {"q_t": True}, TYPE, "q_t", "a tensor", "bool"),
    Bad("v_t list", lambda: {"v_t": []}, TYPE, "v_t", "a tensor", "list"),
    Bad("q_t shape", lambda: {"q_t": x(B, H, N, D)}, VALUE, "q_t", "the shape of q, [2, 4, 6, 8]", "[2, 4, 5, 8]"),
    Bad("k_t broadcasts", lambda: {"k_t": x(1, H, N, D)}, VALUE, "k_t", "the shape of k, [2, 4, 5, 8]", "[1, 4, 5, 8]"),
    Bad("v_t rank", lambda: {"v_t": x(H, N, D)}, VALUE, "v_t", "the shape of v, [2, 4, 5, 8]", "[4, 5, 8]"),
    Bad("q_t dtype", lambda: {"q_t": x(B, H, M, D).double()}, TYPE, "q_t", "torch.float32", "torch.float64"),
    Bad("k_t float8", lambda: {"k_t": x(B, H, N, D).to(torch.float8_e5m2)}, TYPE, "k_t", "float32", "float8_e5m2"),
    Bad("v_t device", lambda: {"v_t": x(B, H, N, D, device="meta")}, VALUE, "v_t", "the device of q, cpu", "meta"),
    Bad("k_t sparse", lambda: {"k_t": x(B, H, N, D).to_sparse()}, UNSUPPORTED, "k_t", "torch.strided", "sparse_coo"),
    Bad("mask as q_t", lambda: {"q_t": x(M, N)}, VALUE, "q_t", "the shape of q", "[6, 5]: a mask is given as"),
    Bad("bool as q_t", lambda: {"q_t": x(N) > 0}, TYPE, "q_t", "the dtype of q", "torch.bool"),
    Bad("mask as q_t, bool", lambda: {"q_t": x(1, N) > 0}, TYPE, "q_t", "the dtype of q", "given as attn_mask"),
    Bad("mask_t list", lambda: of_mask([0.0]), TYPE, "attn_mask_t", "a tensor", "list"),
    Bad("mask_t dtype", lambda: of_mask(x(M, N).double()), TYPE, "attn_mask_t", "torch.float32", "torch.float64"),
    Bad("mask_t shape", lambda: of_mask(x(N)), VALUE, "attn_mask_t", "the shape of attn_mask, [6, 5]", "[5]"),
    Bad("mask_t device", lambda: of_mask(x(M, N, device="meta")), VALUE, "attn_mask_t", "cpu", "meta"),
    Bad("mask_t alone", lambda: {"attn_mask_t": x(M, N)}, VALUE, "attn_mask_t", "a float attn_mask", "no mask"),
]  # fmt: skip


class Recorder(TorchDispatchMode):
    """Names of the operators that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # questions about a tensor, not work
            self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))
