"""The records that carry a call from the public functions to a backend: its tensors by name, and its options.

The dispatcher's schemas follow from them, and a backend's functions take their fields, in this order. A new option is
a new field of `Options`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Maybe = Tensor | None


class Options(NamedTuple):
    """What an operator takes besides tensors."""

    is_causal: bool = False
    scale: float | None = None  # None = D**-0.5
    backend: str | None = None  # None = the best one for the device and dtype

    def of_backend(self, q: Tensor) -> tuple[bool, float]:
        """The options that the backend's function takes."""
        return self.is_causal, q.shape[-1] ** -0.5 if self.scale is None else self.scale


class Inputs(NamedTuple):
    """Something for each of q, k, v and their tangents: the tensors themselves, their gradients, which are wanted."""

    q: Any = None
    k: Any = None
    v: Any = None
    q_t: Any = None
    k_t: Any = None
    v_t: Any = None


class PlainOperands(NamedTuple):
    """The tensors of `flashjvp::forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Maybe = None


class Operands(NamedTuple):
    """The tensors of `flashjvp::forward_jvp`, and of a call of a public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Maybe = None
    k_t: Maybe = None
    v_t: Maybe = None
    mask: Maybe = None

    @property
    def inputs(self) -> Inputs:
        """All but the mask."""
        *inputs, _ = self
        return Inputs(*inputs)

    @property
    def plain(self) -> PlainOperands:
        """All but the tangents."""
        return PlainOperands(self.q, self.k, self.v, self.mask)

    @property
    def has_tangents(self) -> bool:
        """Whether any of q, k and v has a tangent."""
        return not (self.q_t is None and self.k_t is None and self.v_t is None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Operands":
        """The function of each tensor but the mask."""
        *inputs, mask = self
        return Operands._make([*(None if x is None else function(x) for x in inputs), mask])


class PlainBackwardOperands(NamedTuple):
    """The tensors of `flashjvp::backward`."""

    d_o: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    mask: Maybe = None


class BackwardOperands(NamedTuple):
    """The tensors of `flashjvp::backward_jvp`."""

    d_o: Maybe
    d_o_t: Maybe
    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Maybe
    k_t: Maybe
    v_t: Maybe
    o: Tensor
    o_t: Maybe
    lse: Tensor
    mu: Tensor
    mask: Maybe = None


AnyOperands = PlainOperands | Operands | PlainBackwardOperands | BackwardOperands
