"""Float32 arithmetic as compilers for GPUs contract it: a product and the sum that it enters are rounded once."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

SIGNS = {"aten::add": 1, "aten::sub": -1}


class Contracted(TorchDispatchMode):
    """In this block x * y + z and its kin, of float32 tensors, are one multiply-add. It holds in one thread.

    float64 holds the product exactly, and rounds the sum before float32 does: seldom another number than rounded once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._factors = WeakTensorKeyDictionary()  # of each product that is still in use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not isinstance(result, Tensor) or result.dtype != torch.float32 or kwargs:
            return result
        if name == "aten::mul":
            self._factors[result] = args
        elif name in SIGNS:
            x, y = args
            if self._is_product(x):
                return (self._exact(x) + SIGNS[name] * _wide(y)).float()
            if self._is_product(y):
                return (_wide(x) + SIGNS[name] * self._exact(y)).float()
        return result

    def _is_product(self, x: object) -> bool:
        return isinstance(x, Tensor) and x in self._factors

    def _exact(self, product: Tensor) -> Tensor:
        x, y = self._factors[product]
        return _wide(x) * _wide(y)


def _wide(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32).double()
