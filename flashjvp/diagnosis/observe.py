"""Watches one run of a model: which module calls which operators and functions that a JVP has trouble with.

Operators are seen by a TorchDispatchMode, also those that PyTorch's own C++ calls. What the dispatcher does not show (a
call of stock attention, of checkpointing, of a custom Function, a detached tensor) is seen by Python's profiler hook,
and so are the modules. Neither changes what a model computes, as hooks or replaced functions would: PyTorch's
TransformerEncoderLayer, say, takes another path where there are hooks.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import BuiltinFunctionType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .. import _torch, norms
from ..integrations import multihead, sdpa
from . import advice
from .attention_marks import Marks

_CALL_OF_MODULE = nn.Module.__call__.__code__
# Function.apply is Python in some releases and C in others, where it is seen as a builtin.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
_CHECKPOINT_FILE = checkpoint.__file__
_NORMS = {
    norms.layer_norm.__code__: advice.LAYER_NORM,
    norms.batch_norm.__code__: advice.BATCH_NORM,
    norms.instance_norm.__code__: advice.INSTANCE_NORM,
}
# Python functions that attention passes, with its mask and dropout among their arguments.
_ATTENTION = (sdpa.scaled_dot_product_attention.__code__, sdpa.served.__code__, multihead.STOCK.__code__)
_WITHOUT_JVP = {torch.autograd.Function.jvp}
_LAYER_NORMS = ("native_layer_norm",)
_BATCH_NORMS = (
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
_ALWAYS_IN_TRAINING = ("_batch_norm_with_update", "batch_norm_stats")
_RANDOM = ("native_dropout", "bernoulli_", "bernoulli", "_fused_dropout")
_CUTS = ("detach", "detach_", "item", "tolist", "numpy")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "mul")
_SDPA, _INSTANCE_NORM = "scaled_dot_product_attention", "instance_norm"
_BUILTINS = (_SDPA, _INSTANCE_NORM, *_CUTS)
_FLASHJVP = os.path.dirname(norms.__file__)
_NO_MODULE = ("", "function")


class Place(NamedTuple):
    """A kind of finding at a module, and what exactly was called there."""

    kind: str
    path: str
    module: str
    detail: str = ""


@dataclass
class _Running:
    """A module that is running."""

    where: tuple[str, str]
    had_tangent: bool = False
    noted_no_grad: bool = False


class Observer:
    """Counts by place. `operators` says which modules called an operator, for errors that name one."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.calls: Counter[Place] = Counter()
        self.operators: dict[str, Place] = {}
        self._paths = paths
        self._modules = [_Running(_NO_MODULE)]
        self._builtins: list[str] = []
        self._norms = 0  # how many of flashjvp's norms are running: they call PyTorch's
        self._functions = 0  # how many custom Functions are running: they compute without recording
        self._marks = Marks()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """During this, in this thread."""
        before = sys.getprofile()
        mode = nullcontext() if _torch.TorchDispatchMode is None else _Operators(self)
        with mode, _Functions(self):
            sys.setprofile(self._profile)
            try:
                yield
            finally:
                sys.setprofile(before)

    @property
    def here(self) -> tuple[str, str]:
        """Path and class of the innermost module that is running."""
        return self._modules[-1].where

    @property
    def _of_softmax(self) -> tuple[str, str]:
        """Path and class of the innermost module that is more than a softmax."""
        return next(module.where for module in reversed(self._modules) if module.where[1] != nn.Softmax.__name__)

    def raised_in(self, error: BaseException) -> tuple[str, str]:
        """Path and class of the innermost module that an error passed through."""
        found, trace = _NO_MODULE, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is _CALL_OF_MODULE:
                module = trace.tb_frame.f_locals["self"]
                if (path := self._paths.get(id(module))) is not None:
                    found = path, type(module).__name__
            trace = trace.tb_next
        return found

    def note(self, kind: str, detail: str = "") -> None:
        self.calls[Place(kind, *self.here, detail)] += 1

    # Python's profiler hook: it is off while it runs itself.
    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._python_call(frame)
        elif event == "return":
            self._python_return(frame, arg)
        elif isinstance(arg, BuiltinFunctionType):
            self._builtin(event, arg, frame.f_code.co_filename)

    def _python_call(self, frame: FrameType) -> None:
        code = frame.f_code
        if code is _CALL_OF_MODULE:
            module = frame.f_locals["self"]
            if (path := self._paths.get(id(module))) is None:
                self._modules.append(_Running(self.here))
                return
            given = (*frame.f_locals.get("args", ()), *frame.f_locals.get("kwargs", {}).values())
            self._modules.append(_Running((path, type(module).__name__), _any_tangent(given)))
        elif code in _NORMS:
            self._norms += 1
            if self._norms == 1:  # they call themselves below a transform
                self.note(_NORMS[code], advice.BY_FLASHJVP)
        elif code in _ATTENTION:
            of_call = frame.f_locals
            dropout_p = of_call["dropout_p"] if of_call.get("training", True) else 0.0
            self.options_of_attention(of_call["attn_mask"], dropout_p)
        elif code is _APPLY:
            self._custom_function(frame.f_locals["cls"])
        elif code.co_name == "checkpoint" and code.co_filename == _CHECKPOINT_FILE:
            self.note(advice.CHECKPOINT)

    def _python_return(self, frame: FrameType, result: Any) -> None:
        if frame.f_code in _NORMS:
            self._norms -= 1
        elif frame.f_code is _APPLY:
            self._functions -= 1
        elif frame.f_code is _CALL_OF_MODULE and len(self._modules) > 1:
            if (
                self._modules[-1].had_tangent
                and result is not None
                and _tensors(result)
                and not _any_tangent((result,))
            ):
                self.note(advice.CUT, "the module's output")
            self._modules.pop()

    def _builtin(self, event: str, function: Any, file: str) -> None:
        name = function.__name__
        if name == "apply" and isinstance(of := function.__self__, type) and issubclass(of, torch.autograd.Function):
            if event == "c_call":
                self._custom_function(of)
            else:
                self._functions -= 1
        if name not in _BUILTINS:
            return
        if event != "c_call":
            self._builtins.remove(name)
            return
        self._builtins.append(name)
        if self._builtins.count(name) > 1:  # a mode saw it and calls it again
            return
        if name == _SDPA:
            self.note(advice.SDPA)
        elif name in _CUTS and not file.startswith(_FLASHJVP) and _any_tangent((function.__self__,)):
            self.note(advice.CUT, f".{name}()")

    def _custom_function(self, cls: Any) -> None:
        """One begins. functorch wraps one into another, of which the outermost counts."""
        self._functions += 1
        if self._functions > 1 or cls.__module__.split(".")[0] in ("torch", "flashjvp"):
            return
        name = f"{cls.__module__}.{cls.__qualname__}"
        has_jvp = cls.jvp not in _WITHOUT_JVP or getattr(cls, "generate_vmap_rule", False) is None
        self.note(advice.OWN_JVP if has_jvp else advice.FUNCTION, name)

    def options_of_attention(self, mask: Any, dropout_p: Any) -> None:
        """A mask that is learned, and dropout, of one call of attention."""
        if isinstance(mask, Tensor) and (_torch.needs_gradient(mask) or _any_tangent((mask,))):
            self.note(advice.LEARNED_MASK)
        if dropout_p > 0:
            self.note(advice.DROPOUT)

    # Operators, as the dispatch mode sees them.
    def operator(self, library: str, name: str, args: tuple[Any, ...], result: Any) -> None:
        if library == "flashjvp":
            self.note(advice.ATTENTION)
        if library == "flashjvp" or self._norms:
            return
        self.operators.setdefault(name, Place("", *self.here, name))
        if _SDPA not in self._builtins:
            for where in self._marks.see(name, args, result, self._of_softmax):
                self.calls[Place(advice.DENSE, *where)] += 1
        if name in _LAYER_NORMS:
            self.note(advice.LAYER_NORM)
        elif name in _ALWAYS_IN_TRAINING or (name in _BATCH_NORMS and any(arg is True for arg in args)):
            self.note(advice.INSTANCE_NORM if _INSTANCE_NORM in self._builtins else advice.BATCH_NORM)
        elif name in _RANDOM:
            self.note(advice.DROPOUT)
        elif name in _PRODUCTS and not torch.is_grad_enabled() and not self._functions:
            if not self._modules[-1].noted_no_grad:
                self.note(advice.NO_GRAD)
            self._modules[-1].noted_no_grad = True


_Mode: Any = _torch.TorchDispatchMode or object


class _Operators(_Mode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        library, _, name = func.name().partition("::")
        self.observer.operator(library, name.partition(".")[0], args, result)
        return result


class _Functions(TorchFunctionMode):
    """Sees the attribute `data` of a tensor, which is neither an operator nor a call, and the options of attention."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__ and _any_tangent(args[:1]):  # type: ignore[attr-defined]
            self.observer.note(advice.CUT, ".data")
        kwargs = kwargs or {}
        if func is sdpa.STOCK:
            names = ("query", "key", "value", "attn_mask", "dropout_p")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.observer.options_of_attention(given.get("attn_mask"), given.get("dropout_p", 0.0))
        return func(*args, **kwargs)


def _tensors(x: Any) -> list[Tensor]:
    """Real tensors in a tensor, tuple, list or dict, however deep."""
    if isinstance(x, Tensor):
        return [x] if x.is_floating_point() else []
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _any_tangent(values: tuple[Any, ...]) -> bool:
    return any(_torch.unpack_dual(tensor)[1] is not None for value in values for tensor in _tensors(value))
