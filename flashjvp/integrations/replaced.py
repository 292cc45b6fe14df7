"""`flashjvp.replaced`: a context in which models that nobody rewrote use flashjvp; `install` and `uninstall`."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from ..errors import ArgumentTypeError, ArgumentValueError
from ..serving import check_precision
from . import (
    active,
    batch_counts,
    checkpointing,
    flash_attn,
    functional_jvp,
    multihead,
    norm_functions,
    sdpa,
    switches,
    xformers,
)  # fmt: skip
from .patches import Patches
from .report import Recorder, Report

Function = Callable[..., Any]


def replacements() -> Mapping[Function, Function]:
    """What is replaced by what."""
    return {
        sdpa.STOCK: sdpa.scaled_dot_product_attention,
        norm_functions.STOCK_LAYER_NORM: norm_functions.layer_norm,
        norm_functions.STOCK_BATCH_NORM: norm_functions.batch_norm,
        norm_functions.STOCK_INSTANCE_NORM: norm_functions.instance_norm,
        norm_functions.STOCK_GROUP_NORM: norm_functions.group_norm,
        norm_functions.TORCH_GROUP_NORM: norm_functions.torch_group_norm,
        norm_functions.TORCH_LAYER_NORM: norm_functions.torch_layer_norm,
        norm_functions.TORCH_BATCH_NORM: norm_functions.torch_batch_norm,
        norm_functions.TORCH_INSTANCE_NORM: norm_functions.torch_instance_norm,
        multihead.STOCK: multihead.multi_head_attention_forward,
        multihead.STOCK_FAST_PATH: multihead.get_fastpath_enabled,
        checkpointing.STOCK: checkpointing.checkpoint,
        functional_jvp.STOCK: functional_jvp.jvp,
        **batch_counts.replacements(),
        **flash_attn.PACKAGE.replacements(),
        **xformers.PACKAGE.replacements(),
    }


_PATCHES = Patches(replacements)


class Replaced:
    """A context of `replaced`. It can be entered again, also inside itself."""

    def __init__(
        self, model: nn.Module | None, fallback: str, when: str, norms: bool, checkpoint: bool,
        precision: Literal["high"] | None,
    ) -> None:  # fmt: skip
        self.model, self.fallback, self.when, self.norms, self.checkpoint = model, fallback, when, norms, checkpoint
        self.precision, self.is_plain = precision, when == "always" and precision is None
        self.entered = 0
        self.report_of = Recorder(model)
        self._switched: list[list[nn.Module]] = []
        self._lock = threading.Lock()

    def report(self) -> Report:
        """Prints and returns what was intercepted up to now."""
        found = self.report_of.report()
        print(found)
        return found

    def leaves_alone(self, tensors: Any) -> bool:
        """Whether PyTorch's own function serves a call with these tensors."""
        return self.when == "jvp" and not sdpa.any_tangent(tensors)

    def __enter__(self) -> "Replaced":
        self._put()
        active.push(self)
        return self

    def __exit__(self, *_: object) -> None:
        active.remove(self)
        self._put_back()

    def _put(self) -> None:
        model = [] if self.model is None else [self.model]
        _PATCHES.hold(vars(module) for root in model for module in root.modules())
        switched = [held for root in model for held in switches.switch_on(root)]
        self.report_of.note_switches(switched)
        with self._lock:
            self._switched.append(switched)
            self.entered += 1

    def _put_back(self) -> None:
        with self._lock:
            self.entered -= 1
            switched = self._switched.pop()
        switches.switch_back(switched)
        _PATCHES.release()


def replaced(
    model: nn.Module | None = None,
    *,
    fallback: Literal["raise", "dense"] = "raise",
    when: Literal["always", "jvp"] = "always",
    norms: bool = True,
    checkpoint: bool = True,
    precision: Literal["high"] | None = None,
) -> Replaced:
    """A context in which models that nobody rewrote use flashjvp, under a JVP and in the backward pass through it.

    ::

        with flashjvp.replaced(model) as replaced:
            u, du = torch.func.jvp(model, (x, t), (v, torch.ones_like(t)))
            loss(u, du).backward()
        replaced.report()

    Replaced, wherever a loaded module refers to them: `scaled_dot_product_attention`, `multi_head_attention_forward`
    (nn.MultiheadAttention, nn.TransformerEncoder, ..., whose fast path is off), `layer_norm`, `batch_norm` in training,
    `torch.utils.checkpoint.checkpoint`, `torch.autograd.functional.jvp`, and of xformers and flash_attn, if they were
    imported, their attention. Contexts may be nested, and entered in several threads; a thread that is in none gets
    PyTorch's own functions. All is put back on exit. A checkpoint is recomputed in the context of its forward, in
    whatever thread and however late that happens; other backward passes need no context.

    Args:
        model: also what is particular to it: switches `fused_attn` (timm) are on in the context, functions kept in its
            modules' attributes are replaced, and the report names its modules.
        fallback: what becomes of attention that flashjvp refuses: "raise" its error, or "dense", the equations in
            memory O(M N), which is reported.
        when: "always", or "jvp": calls without a tangent are PyTorch's own. Compiled code counts as within a JVP.
        norms: whether norms are replaced by `flashjvp.layer_norm` and `flashjvp.batch_norm`.
        checkpoint: whether checkpoints inside a JVP are those of `flashjvp.checkpoint`.
        precision: as in `attention`. Results are then rounded to the type in which PyTorch's own functions give them.

    Returns:
        The context. Its `report()` prints and returns what was intercepted, how often, what served it, and which
        modules of the model that look like attention no call came from.

    Derivatives:
        Those of `attention`, `layer_norm`, `batch_norm` and `checkpoint`.

    Raises:
        ArgumentTypeError: (a TypeError) a model that is no nn.Module, a `precision` that is no string.
        ArgumentValueError: (a ValueError) another word for `fallback`, `when` or `precision`.
        In the context, what `attention` raises.

    Numerics:
        As `attention`.

    Source:
        docs/models.md.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module or None, got an object of type {type(model).__name__}")
    if fallback not in ("raise", "dense"):
        raise ArgumentValueError(f"fallback: expected 'raise' or 'dense', got {fallback!r}")
    if when not in ("always", "jvp"):
        raise ArgumentValueError(f"when: expected 'always' or 'jvp', got {when!r}")
    check_precision(precision)
    return Replaced(model, fallback, when, bool(norms), bool(checkpoint), precision)


def install(
    *,
    fallback: Literal["raise", "dense"] = "raise",
    when: Literal["always", "jvp"] = "always",
    norms: bool = True,
    checkpoint: bool = True,
    precision: Literal["high"] | None = None,
) -> Replaced:
    """The same as `replaced`, for all threads and for good: until `uninstall`, or another `install`.

    A thread that is in a context of `replaced` follows that one.

    Args:
        fallback: as in `replaced`.
        when: as in `replaced`.
        norms: as in `replaced`.
        checkpoint: as in `replaced`.
        precision: as in `replaced`.

    Returns:
        What `report()` can be asked of.

    Raises:
        ArgumentTypeError: (a TypeError) as `replaced`.
        ArgumentValueError: (a ValueError) as `replaced`.
    """
    context = replaced(fallback=fallback, when=when, norms=norms, checkpoint=checkpoint, precision=precision)
    context._put()
    before = active.set_for_process(context)
    if before is not None:
        before._put_back()
    return context


def uninstall() -> None:
    """Undoes `install`; nothing where nothing is installed."""
    before = active.set_for_process(None)
    if before is not None:
        before._put_back()
