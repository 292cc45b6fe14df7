"""Has a model compute in float64 throughout, also where its code asks for float32 or less by name."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """The same equations with fewer rounding errors: each dtype of real numbers that is asked for is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        kwargs = {name: _long(value) for name, value in (kwargs or {}).items()}
        return func(*map(_long, args), **kwargs)


def _long(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORT else value
