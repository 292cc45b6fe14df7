"""Recognises attention that a model writes out: products of matrices, a softmax of them, products with that."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .. import _torch

_PRODUCTS = ("bmm", "baddbmm", "mm")
_SOFTMAXES = ("_softmax", "_safe_softmax")
_MOST = 64  # tensors that are remembered: a softmax follows its scores closely


class Softmax(NamedTuple):
    """The number of a softmax in a run, and the path and class of the module that called it."""

    number: int
    where: tuple[str, str]


class Marks:
    """Remembers which tensors are scores, and which are weights that a softmax made of scores.

    It holds the last ones, so that no other tensor can get their memory and be taken for them.
    """

    def __init__(self) -> None:
        self._marked: deque[tuple[Tensor, Softmax | None]] = deque(maxlen=_MOST)  # None: scores
        self._softmaxes = 0
        self._counted: set[Softmax] = set()

    def see(self, name: str, args: tuple[Any, ...], result: Any, here: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """Yields where a softmax was, once for each whose weights enter a product."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        given = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(x, Tensor)]
        marks = [mark for x in given for mark in self._marks_of(x)]
        if name in _PRODUCTS:
            new = {mark for mark in marks if mark is not None} - self._counted
            self._counted |= new
            yield from (softmax.where for softmax in new)
            if result.ndim >= 3:
                self._marked.append((result, None))
        elif name in _SOFTMAXES:
            if None in marks and result.shape[-1] > 1:
                self._softmaxes += 1
                self._marked.append((result, Softmax(self._softmaxes, here)))
        elif marks and not _torch.is_zero(result) and result.numel() == max(math.prod(x.shape) for x in given):
            self._marked.append((result, next((mark for mark in marks if mark is not None), None)))

    def _marks_of(self, x: Tensor) -> Iterator[Softmax | None]:
        if not x.numel() or _torch.is_zero(x):
            return iter(())
        memory = x.untyped_storage().data_ptr()
        return (mark for tensor, mark in self._marked if tensor.untyped_storage().data_ptr() == memory)
