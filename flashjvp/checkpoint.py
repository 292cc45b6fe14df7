"""Activation checkpointing that works where a JVP is differentiated in reverse, as PyTorch's own does not.

What is recomputed in a backward pass runs after the forward-mode level has ended. So tangents are taken off, the level
is left, a function of primals and tangents is checkpointed that enters a level of its own, and its results are made
dual again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint as torch_checkpoint

from . import _torch
from .captured import lifted
from .errors import UnsupportedError

Maybe = Tensor | None
Tensors = Callable[..., tuple[Tensor, ...]]
Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
_CHECKPOINT = torch_checkpoint.checkpoint  # PyTorch's own, whatever stands in its place later
_OPTIONS = ("context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
_TENSOR = object()  # stands for one


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = False, **kwargs: Any) -> Any:
    """Activation checkpointing, also inside a JVP: a drop-in for `torch.utils.checkpoint.checkpoint`.

    `function(*args, **kwargs)`, whose intermediate results are not kept for the backward pass but computed again there,
    those of the tangents included.

    Args:
        function: what to compute. Tensors with tangents are found in its arguments, in those of a functools.partial,
            and in the variables of a closure.
        args: its arguments, of any kind.
        use_reentrant: as PyTorch's, where no tensor has a tangent. With tangents the variant that is not reentrant
            serves.
        kwargs: its keyword arguments, and PyTorch's options `context_fn`, `determinism_check`, `debug`, `early_stop`
            and `preserve_rng_state` (which keeps dropout as it was).

    Returns:
        What the function returns; tensors in nested tuples, lists and dicts carry their tangents.

    Derivatives:
        Those of the function, in reverse mode (`backward`, `torch.autograd.grad`), in forward mode (`torch.func.jvp`,
        `torch.autograd.forward_ad`), nested as the function allows, and in reverse through forward.

    Raises:
        UnsupportedError: (a NotImplementedError) a module in the function whose parameters have tangents;
            `torch.func.vmap` or `torch.func.grad` around it; a PyTorch without the names that this needs.

    Numerics:
        Those of the function.

    Source:
        Chen et al., arXiv 1604.06174.
    """
    if torch.compiler.is_compiling() or not _torch.may_carry_tangents():
        return _CHECKPOINT(function, *args, use_reentrant=use_reentrant, **kwargs)
    if _torch.pytree is None:
        raise UnsupportedError(f"checkpoint: expected a PyTorch with torch.utils._pytree, got {torch.__version__}")
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    brought, rebuild = lifted(function)
    leaves, spec = _torch.pytree.tree_flatten((brought, list(args), kwargs))
    if not _torch.transforms_active() and not any(map(_torch.carries_tangent, leaves)):
        return _CHECKPOINT(function, *args, use_reentrant=use_reentrant, **kwargs, **options)
    results = _Results()

    def tensors(*leaves: Any) -> tuple[Tensor, ...]:
        brought, args, kwargs = _torch.pytree.tree_unflatten(list(leaves), spec)
        return results.tensors(rebuild(brought)(*args, **kwargs))

    return results.whole(_below_levels(tensors, leaves, options))


class _Results:
    """The structure of what a function returns, and all in it that is no tensor: these bypass the checkpoint."""

    def tensors(self, result: Any) -> tuple[Tensor, ...]:
        """The tensors of a result, whose other parts are kept here."""
        leaves, self._spec = _torch.pytree.tree_flatten(result)
        self._others = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        return tuple(x for x in leaves if isinstance(x, Tensor))

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        """The result, with these tensors in it."""
        rest = iter(tensors)
        return _torch.pytree.tree_unflatten([next(rest) if x is _TENSOR else x for x in self._others], self._spec)


def _below_levels(function: Tensors, leaves: Sequence[Any], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that the function returns, checkpointed below every level that gives tangents."""
    if not _torch.transforms_active() and not any(map(_torch.carries_tangent, leaves)):
        o: tuple[Tensor, ...] = _CHECKPOINT(function, *leaves, use_reentrant=False, **options)
        return o
    jvp, level = (_jvp, _level_of_func_jvp()) if _torch.transforms_active() else (_jvp_of_dual_level, None)
    pairs = [_split(x, level) for x in leaves]
    primals, tangents = [primal for primal, _ in pairs], [tangent for _, tangent in pairs if tangent is not None]
    dual = [i for i, (_, tangent) in enumerate(pairs) if tangent is not None]

    def both(*given: Any) -> tuple[Tensor, ...]:
        fixed = list(given[: len(primals)])
        if not dual:
            return function(*fixed)

        def of_duals(*duals: Tensor) -> tuple[Tensor, ...]:
            arguments = list(fixed)
            for i, x in zip(dual, duals, strict=True):
                arguments[i] = x
            return function(*arguments)

        o, o_t = jvp(of_duals, tuple(fixed[i] for i in dual), given[len(primals) :])
        return *o, *o_t

    with nullcontext() if level is None else _left_func_jvp():
        found = _below_levels(both, [*primals, *tangents], options)
    if not dual:
        return found
    half = len(found) // 2
    return tuple(map(_dual, found[:half], found[half:]))


def _level_of_func_jvp() -> int:
    """The number of the innermost transform, which has to be one that can be left."""
    if not _torch.CAN_LEAVE_JVP:
        raise UnsupportedError(
            "checkpoint: expected a PyTorch whose torch.func.jvp can be left for a while, got "
            f"{torch.__version__}, which lacks names for that: use torch.autograd.forward_ad.dual_level"
        )
    transform = _torch.innermost_transform()
    if not _torch.is_in_func_jvp():
        name = transform.key().name.lower()
        raise UnsupportedError(f"checkpoint: expected no transform around it but torch.func.jvp, got torch.func.{name}")
    level: int = transform.level()
    return level


@contextmanager
def _left_func_jvp() -> Iterator[None]:
    layer = _torch.pop_transform()
    try:
        yield
    finally:
        _torch.push_transform(layer)


def _split(x: Any, level: int | None) -> tuple[Any, Maybe]:
    """Primal and tangent of an argument, outside of a level of functorch."""
    if not isinstance(x, Tensor):
        return x, None
    if level is not None:
        x = _torch.unwrap_if_dead(x)  # what was kept from a transform that is over
    primal, tangent = _torch.unpack_dual(x) if x.is_floating_point() else (x, None)
    if level is None:
        return primal, tangent
    return _torch.unwrap_level(primal, level), None if tangent is None else _torch.unwrap_level(tangent, level)


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return _torch.make_dual(primal, tangent) if primal.is_floating_point() else primal


def _jvp(function: Tensors, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Pair:
    o, o_t = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
    return o, o_t


def _jvp_of_dual_level(function: Tensors, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Pair:
    """The same at the level of torch.autograd.forward_ad, which cannot be entered twice."""
    with nullcontext() if _torch.dual_level_active() else forward_ad.dual_level():
        pairs = [_torch.unpack_dual(x) for x in function(*map(_torch.make_dual, primals, tangents))]
        o = tuple(x for x, _ in pairs)
        return o, tuple(torch.zeros_like(x) if x_t is None else x_t for x, x_t in pairs)
