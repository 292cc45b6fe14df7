"""Calls on copies, where kernels cannot read tensors as they lie in memory, or only slowly (Misfit, of eligibility.py).

A head dim that 8 does not divide is padded with zeros to the next multiple of 8: q, k, v and what is like them, and the
results, whose first columns are copied out. That changes no product, and the scale stays that of the call: the bits are
those of a call whose user has padded everything. Of a tensor that TMA cannot address, such as a broadcast one, there is
a copy of its size. What fits is not copied.

Copies live as long as the launches of one call. What autograd saves for the backward pass is what the user gave and
got, and is copied anew there. A replayed call (kernels/launch/replay.py) copies the tensors that it is given, like any
other, but holds all of its memory to its end.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..kernels.hopper.eligibility import fits
from ..kernels.launch.call import Call
from ..kernels.portable.copy_rows import copy_rows
from ..layout import empty_rows
from ..operands import Inputs
from .rows_first import RESULTS

Pairs = dict[str, tuple[Tensor, Tensor]]

_OUTPUTS, _OF_KEYS = ("o", "o_t"), ("k", "v", "k_t", "v_t")
_TANGENTS = ("q_t", "k_t", "v_t", "o_t")
_READ = (*Inputs._fields, "d_o", "d_o_t", *_OUTPUTS)


def made_on_copies(function: Callable[..., Any], record: Any, args: Sequence[Any], addressed: bool) -> tuple[Any, ...]:
    """What a function of a backend gives, of copies of its tensors, which are the first arguments, as a record of
    operands.py has them. `addressed`: by TMA."""
    given: dict[str, Any] = dict(zip(record._fields, args, strict=False))
    found = function(*_copied(given, addressed).values(), *args[len(given) :])
    return _narrowed(given, dict(zip(RESULTS[record], found, strict=True)))


def _copied(given: dict[str, Any], addressed: bool) -> dict[str, Any]:
    """The tensors of a call, with copies of those that need it."""
    unread = _TANGENTS if "d_o_t" in given and given["d_o_t"] is None else ()
    pairs: Pairs = {}
    for name in _READ:
        x = given.get(name)
        if x is None or name in unread:
            continue
        width = -(-x.shape[-1] // 8) * 8
        if width != x.shape[-1] or (addressed and name not in _OUTPUTS and not fits(x)):
            pairs[name] = x, empty_rows(x, width)
    _copy(given, pairs)  # mutate: _copy
    found = {**given, **{name: copy for name, (_, copy) in pairs.items()}}
    return {**found, "o_t": None} if "o_t" in unread and "o_t" in found else found


def _narrowed(given: dict[str, Any], found: dict[str, Any]) -> tuple[Any, ...]:
    """The results, with copies of the first columns of those that are padded."""
    pairs: Pairs = {}
    for name, x in found.items():
        like, of_width = (given["q"], given["v"]) if name in _OUTPUTS else (given.get(name),) * 2
        if x is not None and name in _READ and x.shape[-1] != of_width.shape[-1]:
            pairs[name] = x, empty_rows(like, of_width.shape[-1], x.dtype)  # mutate: pairs
    _copy(given, pairs)
    return tuple(pairs[name][1] if name in pairs else x for name, x in found.items())


def _copy(given: dict[str, Any], pairs: Pairs) -> None:
    """In a launch each for queries and keys, and for tensors of other widths; tensors whose last dim is strided by
    PyTorch."""
    call = Call(given["q"], given["k"], given["v"], None, False)
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (x, to) in pairs.items():
        if x.stride(-1) > 1 and x.shape[-1] > 1:
            width = x.shape[-1]
            to[..., :width].copy_(x.detach())
            to[..., width:].zero_()
        else:
            plain[name] = x, to
    copy_rows(call, _of(plain, keys=False), keys=False)
    copy_rows(call, _of(plain, keys=True), keys=True)


def _of(pairs: Pairs, keys: bool) -> Iterable[tuple[Tensor, Tensor]]:
    return [pair for name, pair in pairs.items() if (name in _OF_KEYS) == keys]
