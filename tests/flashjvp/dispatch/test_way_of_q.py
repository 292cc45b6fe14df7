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


def ways(call: Callable[[], Any]) -> list[list[str]]:
    """Of each launch of a call, and of each product of plain PyTorch, the files on the way."""
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
            call()
        finally:
            sys.setprofile(None)
    return found


def draw(learned: bool = False) -> list[Tensor]:
    return [torch.randn(1, 1, 16, 16, requires_grad=learned) for _ in range(3)]


def check(call: Callable[[], Any], most: int) -> None:
    found = ways(call)
    # Those are the ends of the way: else nothing was measured.
    assert found and {way[0] for way in found} & {"kernels/launch/call.py", "backends/tiled_products.py"}
    assert not [way for way in found if len(way) > most]


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
    with torch.autocast("cpu", torch.float16, enabled=form == "autocast"):
        for learned in (False, True):
            for _ in range(4):  # calls like earlier ones go other ways
                x, x_t = draw(learned), draw()
                if form == "autocast":
                    x = [y.detach().half().requires_grad_(learned) for y in x]
                    x_t = [y.half() for y in x_t]
                results: list[Tensor] = []
                check(lambda x=x: results.append(flashjvp.attention(*x, **options)), MOST_EAGER)
                check(lambda x=x, x_t=x_t: results.extend(flashjvp.attention_jvp(*x, *x_t, **options)), MOST_EAGER)
                if learned:
                    check(lambda: results[0].sum().backward(), MOST_EAGER)
                    check(lambda: (results[1] + results[2]).sum().backward(), MOST_EAGER)


def test_forward_mode(backend: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashjvp.attention(q, k, v, backend=backend)

    for learned in (False, True):
        for _ in range(4):
            x, x_t = draw(learned), draw()
            results: list[Tensor] = []
            check(lambda x=x, x_t=x_t: results.extend(jvp(attention, tuple(x), tuple(x_t))), MOST_UNDER_JVP)
            if learned:
                check(lambda: (results[0] + results[1]).sum().backward(), MOST_EAGER)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, y_t) for y, y_t in zip(draw(), draw(), strict=True)]
        check(lambda: attention(*duals), MOST_EAGER)


def test_func_grad_through_a_jvp(backend: str) -> None:
    _, k, v = draw()

    def loss(q: Tensor) -> Tensor:
        o, o_t = jvp(lambda q: flashjvp.attention(q, k, v, backend=backend), (q,), (q.cos(),))
        return (o + o_t).sum()

    check(lambda: grad(loss)(k), MOST_UNDER_JVP)
