"""Calls on copies, where kernels cannot read tensors as they lie in memory, or only slowly (Misfit, of eligibility.py).

A head dim that 8 does not divide is padded with zeros to the next multiple of 8: q, k, v and what is like them, and the
results, whose first columns are copied out. That changes no product, and the scale stays that of the call: the bits are
those of a call whose user has padded everything. Of a tensor that TMA cannot address, such as a broadcast one, there is
a copy of its size. What fits is not copied.

Copies live as long as the launches of one call. What autograd saves for the backward pass is what the user gave and
got, and is copied anew there. A replayed call (kernels/launch/replay.py) copies the tensors that it is given, like any
other, but holds all of its memory to its end.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..kernels.hopper.eligibility import fits
from ..kernels.portable.copy_rows import copy_rows
from ..layout import empty_rows
from ..operands import Inputs
from .rows_first import RESULTS

_OUTPUTS = ("o", "o_t")
_TANGENTS = ("q_t", "k_t", "v_t", "o_t")
_READ = (*Inputs._fields, "d_o", "d_o_t", *_OUTPUTS)


def made_on_copies(function: Callable[..., Any], record: Any, args: Sequence[Any], addressed: bool) -> tuple[Any, ...]:
    """What a function of a backend gives, of copies of its tensors, which are the first arguments, as a record of
    operands.py has them. `addressed`: by TMA."""
    given: dict[str, Any] = dict(zip(record._fields, args, strict=False))
    found = function(*_copied(given, addressed).values(), *args[len(given) :])
    named = zip(RESULTS[record], found, strict=True)
    return tuple([x if x is None or name not in _READ else _narrowed(x, *_like(name, given)) for name, x in named])


def _copied(given: dict[str, Any], addressed: bool) -> dict[str, Any]:
    """The tensors of a call, with copies of those that need it. Without a cotangent of o_t nobody reads tangents."""
    found = dict(given)
    without_tangents = "d_o_t" in given and given["d_o_t"] is None
    for name in _READ:
        x = given.get(name)
        if x is None or (without_tangents and name in _TANGENTS):
            continue
        width = -(-x.shape[-1] // 8) * 8
        if width != x.shape[-1] or (addressed and name not in _OUTPUTS and not fits(x)):
            found[name] = _copy(x, empty_rows(x, width))  # mutate: found[name]
    if without_tangents and "o_t" in given:
        found["o_t"] = None
    return found


def _like(name: str, given: dict[str, Any]) -> tuple[Tensor, int]:
    """What a result is laid out like, and its width."""
    if name in _OUTPUTS:
        return given["q"], given["v"].shape[-1]
    return given[name], given[name].shape[-1]


def _narrowed(x: Tensor, like: Tensor, width: int) -> Tensor:
    """A result without its columns of padding."""
    return x if x.shape[-1] == width else _copy(x, empty_rows(like, width, x.dtype))


def _copy(x: Tensor, to: Tensor) -> Tensor:
    """`to`, with the rows of x. A tensor whose last dim is strided is copied by PyTorch, which replay does not take."""
    width = x.shape[-1]
    if x.stride(-1) > 1 and width > 1:
        to[..., :width].copy_(x.detach())
        to[..., width:].zero_()
    else:
        copy_rows(x, to)
    return to
