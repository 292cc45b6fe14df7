"""How many files of flashjvp q passes on its way from the public function to a kernel: a reader has to open these.

They are the files of the Python stack when a kernel is launched, or when plain PyTorch multiplies a tile. What looks at
tensors and returns, as checks and guards do, is not on the way.
"""

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from triton.runtime.interpreter import GridExecutor

import flashjvp
from flashjvp.dispatch import fast_path

FOLDER = os.path.dirname(flashjvp.__file__)
MOST_EAGER, MOST_UNDER_JVP = 6, 8
MULTIPLIED = {"matmul", "bmm", "baddbmm", "baddbmm_"}


def files_on_the_way(frame: FrameType | None) -> list[str]:
    """The files of flashjvp on the stack, the last one first."""
    files: dict[str, None] = {}
    while frame is not None:
        if frame.f_code.co_filename.startswith(FOLDER):
            files[os.path.relpath(frame.f_code.co_filename, FOLDER)] = None
        frame = frame.f_back
    return [*files]


def watched(call: Callable[[], Any]) -> tuple[Any, list[list[str]]]:
    """What a call gives, and the files on the way to each of its launches and products of plain PyTorch."""
    found: list[list[str]] = []
    launch = GridExecutor.__call__

    def launched(self: GridExecutor, *args: Any, **options: Any) -> Any:
        found.append(files_on_the_way(sys._getframe()))
        sys.setprofile(None)  # the interpreter makes many calls
        launch(self, *args, **options)
        sys.setprofile(watch)

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and arg.__name__ in MULTIPLIED:
            found.append(files_on_the_way(frame))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launched)
        sys.setprofile(watch)
        try:
            return call(), found
        finally:
            sys.setprofile(None)


def held_to(most: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function gives; no way of its launches has more files than that."""
    result, found = watched(lambda: function(*args, **options))
    # Those are the ends of the way: else nothing was measured.
    assert found and {way[0] for way in found} & {"kernels/launch/call.py", "backends/tiled_products.py"}
    assert not [way for way in found if len(way) > most]
    return result


def draw(dtype: torch.dtype = torch.float32, learned: bool = False) -> list[Tensor]:
    return [torch.randn(1, 1, 16, 16, dtype=dtype, requires_grad=learned) for _ in range(3)]


@pytest.fixture(params=["triton", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    if torch.cuda.is_available() and request.param == "triton":
        pytest.skip("what a GPU runs is launched in C, out of sight here")
    fast_path.forget()
    return str(request.param)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": torch.zeros(16, 16)}, "autocast": {}
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_eager_calls(backend: str, form: str) -> None:
    options = {**FORMS[form], "backend": backend}
    dtype = torch.float16 if form == "autocast" else torch.float32
    with torch.autocast("cpu", torch.float16, enabled=form == "autocast"):
        for learned in (False, True):
            for _ in range(3):  # calls like earlier ones go other ways
                x, x_t = draw(dtype, learned), draw(dtype)
                only_o = held_to(MOST_EAGER, flashjvp.attention, *x, **options)
                o, o_t = held_to(MOST_EAGER, flashjvp.attention_jvp, *x, *x_t, **options)
                if learned:
                    held_to(MOST_EAGER, only_o.sum().backward)
                    held_to(MOST_EAGER, (o + o_t).sum().backward)


def test_forward_mode(backend: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashjvp.attention(q, k, v, backend=backend)

    for learned in (False, True):
        for _ in range(3):
            x, x_t = draw(learned=learned), draw()
            o, o_t = held_to(MOST_UNDER_JVP, jvp, attention, tuple(x), tuple(x_t))
            if learned:
                held_to(MOST_EAGER, (o + o_t).sum().backward)
    with forward_ad.dual_level():
        held_to(MOST_EAGER, attention, *map(forward_ad.make_dual, draw(), draw()))


def test_func_grad_through_a_jvp(backend: str) -> None:
    q, k, v = draw()

    def loss(q: Tensor) -> Tensor:
        o, o_t = jvp(lambda q: flashjvp.attention(q, k, v, backend=backend), (q,), (q.cos(),))
        return (o + o_t).sum()

    held_to(MOST_UNDER_JVP, grad(loss), q)
