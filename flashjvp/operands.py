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
    dropout_p: float = 0.0  # a seed is then among the tensors

    def of_backend(self, q: Tensor) -> tuple[bool, float, float]:
        """The options that the backend's function takes."""
        return self.is_causal, q.shape[-1] ** -0.5 if self.scale is None else self.scale, self.dropout_p


class Inputs(NamedTuple):
    """Something for each of q, k, v and their tangents: the tensors themselves, their gradients, which are wanted."""

    q: Any = None
    k: Any = None
    v: Any = None
    q_t: Any = None
    k_t: Any = None
    v_t: Any = None


class Gradients(NamedTuple):
    """Something for the gradient of each input of `flashjvp::forward_jvp`: the tensors, or which are wanted."""

    q: Any = None
    k: Any = None
    v: Any = None
    q_t: Any = None
    k_t: Any = None
    v_t: Any = None
    mask: Any = None
    mask_t: Any = None


class PlainOperands(NamedTuple):
    """The tensors of `flashjvp::forward`.

    `seed` is that of dropout (MATH.md, section 8): int64, with the leading batch dims whose entries have one of their
    own, or 1 there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Maybe = None
    seed: Maybe = None


class Operands(NamedTuple):
    """The tensors of `flashjvp::forward_jvp`, and of a call of a public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Maybe = None
    k_t: Maybe = None
    v_t: Maybe = None
    mask: Maybe = None
    mask_t: Maybe = None
    seed: Maybe = None

    @property
    def inputs(self) -> Inputs:
        """All but the mask, its tangent and the seed."""
        return Inputs(*self[:6])

    @property
    def plain(self) -> PlainOperands:
        """All but the tangents."""
        return PlainOperands(self.q, self.k, self.v, self.mask, self.seed)

    @property
    def has_tangents(self) -> bool:
        """Whether any of q, k, v and the mask has a tangent."""
        return not (self.q_t is None and self.k_t is None and self.v_t is None and self.mask_t is None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Operands":
        """The function of each tensor but the mask, its tangent and the seed."""
        return self._replace(**{
            name: function(x) for name, x in zip(Inputs._fields, self.inputs, strict=True) if x is not None
        })  # fmt: skip

    def map_masks(self, function: Callable[[Tensor], Tensor]) -> "Operands":
        """The function of the mask and of its tangent."""
        mask, mask_t = (None if x is None else function(x) for x in (self.mask, self.mask_t))
        return self._replace(mask=mask, mask_t=mask_t)


class PlainBackwardOperands(NamedTuple):
    """The tensors of `flashjvp::backward`."""

    d_o: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    mask: Maybe = None
    seed: Maybe = None


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
    mask_t: Maybe = None
    seed: Maybe = None


AnyOperands = PlainOperands | Operands | PlainBackwardOperands | BackwardOperands

RECORDS: dict[str, Any] = {
    "forward": PlainOperands, "forward_jvp": Operands, "backward": PlainBackwardOperands,
    "backward_jvp": BackwardOperands,
}  # fmt: skip
"""Of the tensors of each operator, and of a backend's function of the same name."""
