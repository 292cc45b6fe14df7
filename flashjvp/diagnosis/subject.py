"""What is checked: a copy of the model with its inputs and tangents, as one function that can be run again and again.

A run neither sees nor leaves anything of another one: it begins with the same random numbers and the same buffers.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, ArgumentValueError
from .in_double import InDouble

# A layer whose parameters are all zero hides every error before it. Those of the copy get values of this size.
_INSTEAD_OF_ZERO = 0.1


class Pair(NamedTuple):
    """A function's value and its tangent, as one vector of numbers each."""

    value: Tensor
    tangent: Tensor


class Called(nn.Module):
    """The model together with how it is called, so that PyTorch's functional_call can exchange its buffers."""

    def __init__(self, model: nn.Module, function: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            return self.model(*args, **kwargs)
        return self.function(self.model, *args, **kwargs)


class Subject:
    """A private copy of a model, called on inputs of which some have tangents."""

    def __init__(
        self, model: nn.Module, inputs: Any, tangents: Any, function: Callable[..., Any] | None, seed: int
    ) -> None:
        self.names, values = _named("inputs", inputs)
        self.is_dict = isinstance(inputs, Mapping)
        self.values = [value.detach().clone() if isinstance(value, Tensor) else value for value in values]
        self.tangents = _tangents(self.names, values, tangents, self.is_dict)
        self.seed = seed
        self.is_double = False
        self.is_dense = False  # whether attention is to be computed by its equations where nothing else can
        self.called = Called(_copy(model), function)
        self.paths = {id(module): path for path, module in self.called.model.named_modules()}

    def to_double(self) -> None:
        """Everything in float64, and no layer that is all zero."""
        self.is_double = True
        self.called.double()
        self.values = [_double(value) for value in self.values]
        self.tangents = {place: tangent.double() for place, tangent in self.tangents.items()}
        with torch.no_grad(), self.same_numbers():
            for parameter in self.called.parameters():
                if parameter.numel() and not parameter.any():
                    parameter.normal_(0.0, _INSTEAD_OF_ZERO)

    @property
    def model(self) -> nn.Module:
        return self.called.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.called.parameters() if parameter.requires_grad]

    def output(self, step: float = 0.0) -> Tensor:
        """The model's output, all its numbers in one vector, at inputs moved by `step` along their tangents."""
        with self.same_numbers():
            return self._run(*(self.values[place] + step * tangent for place, tangent in self.tangents.items()))

    def jvp(self, keeps_buffers: bool = True) -> Pair:
        """Output and tangent. Without `keeps_buffers` the model changes its buffers as it would in training."""
        primals = tuple(self.values[place] for place in self.tangents)
        tangents = tuple(self.tangents.values())
        with self.same_numbers():
            run = self._run if keeps_buffers else self._run_plain
            return Pair(*torch.func.jvp(run, primals, tangents))

    def _run(self, *moved: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.called.named_buffers()}
        args, kwargs = self._arguments(moved)
        with InDouble() if self.is_double else nullcontext():
            return _vector(torch.func.functional_call(self.called, buffers, args, kwargs))

    def _run_plain(self, *moved: Tensor) -> Tensor:
        args, kwargs = self._arguments(moved)
        return _vector(self.called(*args, **kwargs))

    def _arguments(self, moved: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = list(self.values)
        for place, value in zip(self.tangents, moved, strict=True):
            values[place] = value
        return ((), dict(zip(self.names, values, strict=True))) if self.is_dict else (tuple(values), {})

    @contextmanager
    def same_numbers(self) -> Iterator[None]:
        """The same random numbers in every run; the generators are put back afterwards."""
        state = random.getstate()
        tensors = [*self.called.parameters(), *(value for value in self.values if isinstance(value, Tensor))]
        devices = sorted({x.device.index for x in tensors if x.device.type == "cuda"})
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            try:
                yield
            finally:
                random.setstate(state)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy without gradients. Its hooks are copied with it, as they are part of what it computes."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # a model may have a __deepcopy__ of its own, or hold anything
        expected = "a model that copy.deepcopy can copy"
        raise ArgumentTypeError(f"model: expected {expected}, got {type(error).__name__}: {error}") from error
    copied.zero_grad(set_to_none=True)
    return copied


def _named(argument: str, given: Any) -> tuple[list[str], list[Any]]:
    """Names and values of a tuple, a list or a dict; one tensor counts as a tuple of it."""
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, Mapping):
        for name in given:
            if not isinstance(name, str):
                came = f"a key of type {type(name).__name__}"
                raise ArgumentTypeError(f"{argument}: expected names of arguments as keys, got {came}")
        return list(given), list(given.values())
    if not isinstance(given, tuple | list):
        came = f"an object of type {type(given).__name__}"
        raise ArgumentTypeError(f"{argument}: expected a tuple or dict as the model's forward takes them, got {came}")
    return [f"{argument}[{place}]" for place in range(len(given))], list(given)


def _tangents(names: list[str], values: list[Any], given: Any, is_dict: bool) -> dict[int, Tensor]:
    """By the place of its input, each tangent that is not None."""
    tangent_names, tangents = _named("tangents", given)
    if isinstance(given, Mapping) != is_dict:
        came = f"an object of type {type(given).__name__}"
        raise ArgumentTypeError(f"tangents: expected a {'dict' if is_dict else 'tuple'} like inputs, got {came}")
    if is_dict:
        unknown = [name for name in tangent_names if name not in names]
        if unknown:
            raise ArgumentValueError(f"tangents: expected names of inputs ({', '.join(names)}), got {unknown[0]!r}")
        by_name = dict(zip(tangent_names, tangents, strict=True))
        tangents = [by_name.get(name) for name in names]
    if len(tangents) != len(values):
        raise ArgumentValueError(f"tangents: expected one for each of {len(values)} inputs, got {len(tangents)}")
    found = {}
    for place, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
        if tangent is not None:
            found[place] = _tangent(f"tangents[{names[place]!r}]" if is_dict else f"tangents[{place}]", value, tangent)
    if not found:
        raise ArgumentValueError("tangents: expected at least one that is not None, got none")
    return found


def _tangent(name: str, value: Any, tangent: Any) -> Tensor:
    if not isinstance(tangent, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor or None, got an object of type {type(tangent).__name__}")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = str(value.dtype) if isinstance(value, Tensor) else f"one of type {type(value).__name__}"
        raise ArgumentTypeError(f"{name}: expected None, as only inputs of real numbers have tangents, got {came}")
    if tangent.shape != value.shape:
        expected = f"the shape of its input, {list(value.shape)}"
        raise ArgumentValueError(f"{name}: expected {expected}, got shape {list(tangent.shape)}")
    if tangent.dtype is not value.dtype:
        raise ArgumentTypeError(f"{name}: expected the dtype of its input, {value.dtype}, got {tangent.dtype}")
    if tangent.device != value.device:
        raise ArgumentValueError(f"{name}: expected the device of its input, {value.device}, got {tangent.device}")
    return tangent.detach().clone()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _vector(output: Any) -> Tensor:
    """All real numbers of an output, be it a tensor, a tuple, a dict or a record of such, in one vector."""
    found = [tensor.flatten() for tensor in _tensors(output)]
    if not found:
        came = f"an object of type {type(output).__name__}"
        raise ArgumentTypeError(f"model: expected an output with a tensor of real numbers, got {came}")
    return torch.cat([tensor.to(found[0].dtype) for tensor in found])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
