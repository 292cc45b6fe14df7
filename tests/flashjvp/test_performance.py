"""The warning that a GPU could be faster: where it comes, once, of what, and where it does not."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashjvp
from flashjvp import FlashJVPPerformanceWarning, environment, performance
from flashjvp.backends import select
from flashjvp.backends import triton as kernels
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import replay
from flashjvp.operands import Inputs

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """As in a fresh process."""
    environment.forget()
    yield
    environment.forget()


def said(function: Any, *arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(*arguments)
    assert all(issubclass(one.category, FlashJVPPerformanceWarning) for one in found)
    return [str(one.message) for one in found]


def test_a_gpu_without_kernels_is_warned_about_once(machine: Callable[..., None]) -> None:
    machine(capability=(7, 5))
    (text,) = said(select.resolve, None, GPU, torch.bfloat16)
    assert "cuda:0" in text and "got (7, 5)" in text and "flashjvp.explain" in text
    assert not said(select.resolve, None, GPU, torch.bfloat16)
    assert not said(select.resolve, None, GPU, torch.float16)


def test_a_gpu_without_triton_is_told_what_to_install(machine: Callable[..., None]) -> None:
    machine(has_triton=False)
    (text,) = said(select.resolve, None, GPU, torch.float32)
    assert "pip install triton" in text


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        pytest.param(None, GPU, torch.float64, id="a dtype is the user's choice"),
        pytest.param("tiled", GPU, torch.float16, id="so is a backend"),
        pytest.param(None, torch.device("cpu"), torch.float32, id="a CPU has no kernels"),
        pytest.param(None, torch.device("meta"), torch.float32, id="nor has meta"),
    ],
)
def test_choices_are_not_warned_about(
    name: str | None, device: torch.device, dtype: torch.dtype, machine: Callable[..., None]
) -> None:
    machine(capability=(7, 5))
    assert not said(select.resolve, name, device, dtype)


def call(**changes: Any) -> Any:
    """One that the warp-specialised kernels serve, on a GPU."""
    columns, mask = (64, 64), None
    of_call = {
        "seed": None, "is_empty": False, "device": GPU, "precision": "half", "width": 64, "k_columns": columns,
        "v_columns": columns, "mask": mask, "batch_shape": (1,), "pattern": None,
    }  # fmt: skip
    return SimpleNamespace(**of_call | changes)


def inputs(first: Tensor | None = None) -> Inputs:
    q, k, v = torch.empty(3, 1, 2, 8, 64, dtype=torch.float16)
    return Inputs(q if first is None else first, k, v)


@pytest.fixture
def with_tiles(machine: Callable[..., None]) -> Callable[..., None]:
    """A GPU for which there are warp-specialised kernels, in use with this Triton."""
    machine(capability=(9, 0), triton_release=(3, 6))
    return machine


def test_a_triton_that_keeps_kernels_off_is_warned_about(with_tiles: Callable[..., None]) -> None:
    with_tiles(triton_release=(3, 5))
    (text,) = said(kernels.hopper_of, call(), 1.0, inputs())
    assert "portable kernels" in text and "Install a Triton that they were measured with" in text
    assert not said(kernels.hopper_of, call(), 1.0, inputs())


def kernels_of(*arguments: Any) -> None:
    """As a function of the backend looks for them, which is made on copies if that raises Misfit."""
    with contextlib.suppress(eligibility.Misfit):
        kernels.hopper_of(*arguments)


def test_copies_are_warned_about(with_tiles: Callable[..., None]) -> None:
    columns = torch.empty(1, 2, 64, 8, dtype=torch.float16).mT
    (text,) = said(kernels_of, call(), 1.0, inputs(columns))
    assert "on copies" in text and "q.contiguous() avoids that" in text
    assert not said(kernels_of, call(), 1.0, inputs(columns))
    d_o = torch.empty((), dtype=torch.float16).expand(1, 2, 8, 64)
    (text,) = said(kernels_of, call(), 1.0, inputs(), d_o, None)
    assert "the gradient of o is broadcast" in text
    (text,) = said(kernels_of, call(k_columns=(36, 32, 16)), 1.0, inputs(torch.empty(1, 2, 8, 36).half()))
    assert "D=36 is not a multiple of 8: each call copies" in text and "scale=D**-0.5" in text


def test_what_a_call_asks_for_is_not_warned_about(with_tiles: Callable[..., None]) -> None:
    """Nor what another layout would not change."""
    columns = torch.empty(1, 2, 64, 8, dtype=torch.float16).mT
    assert not said(kernels.hopper_of, call(), -1.0, inputs(columns))
    with_tiles(capability=(8, 0))
    assert not said(kernels.hopper_of, call(), 1.0, inputs(columns))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_warning_names_the_line_of_the_user(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And breaks no graph."""
    replay.forget()
    monkeypatch.setattr(kernels, "hopper_of", lambda *call: performance.warn_once("slow"))
    q, k, v = torch.randn(3, 1, 1, 5, 16)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashjvp.attention(q, k, v, backend="triton")

    function = torch.compile(attention, backend="eager", fullgraph=True) if compiled else attention
    with pytest.warns(FlashJVPPerformanceWarning, match="slow") as found:
        function(q, k, v)
    (ours,) = (one for one in found if one.category is FlashJVPPerformanceWarning)  # numpy may warn the interpreter
    assert compiled or ours.filename == __file__
