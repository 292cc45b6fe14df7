"""Float32 multiply-add as GPU compilers emit it: a product and the sum that it enters are rounded once."""

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
        self._products = WeakTensorKeyDictionary()  # of each that is still in use, its version and the exact numbers

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in this block, and PyTorch's way to see to that takes longer than most products here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32 or kwargs:
            return result
        if name == "aten::mul":
            self._products[result] = (result._version, _wide(args[0]) * _wide(args[1]))
        elif name in SIGNS:
            x, y = args
            exact_x, exact_y = self._exact(x), self._exact(y)
            if exact_x is not None:
                return (exact_x + SIGNS[name] * _wide(y)).float()
            if exact_y is not None:
                return (_wide(x) + SIGNS[name] * exact_y).float()
        return result

    def _exact(self, x: Any) -> Tensor | None:
        """The exact numbers of a product; None of what is none, or was changed in place since."""
        version, exact = self._products.get(x, (None, None)) if isinstance(x, Tensor) else (None, None)
        return exact if version is not None and x._version == version else None


def _wide(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32).double()
