"""Calls while another thread is inside a forward-mode level: PyTorch counts dual levels for the whole process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp

from flashjvp._torch import eager

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject, operands

Pause = Callable[[], None]


def beside_other_threads(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Calls with explicit tangents, and their backward pass, have the same bits; dual tensors keep their tangents."""
    alone, found = subject.results(inputs), []
    with torch.no_grad():
        for _ in range(3):  # calls like earlier ones go a short way (fast_path.py), which dual tensors must not take
            subject.attention(inputs)(*[x.detach() for x in operands(inputs)[:3]])
    for name, place in {"func.jvp": _in_jvp, "a dual level": _in_dual_level}.items():
        with _elsewhere(place):
            results = subject.results(inputs)
        found += [replace(x, quantity=f"{x.quantity} beside {name}") for x in tolerance.same_bits(results, alone)]
        try:
            with _elsewhere(place):
                o, o_t = _of_duals(inputs, subject)
        except NotImplementedError as error:  # PyTorch's, of a product that writes into memory: it met a tangent
            found.append(Identity(f"duals beside {name}", None, None, False, str(error)))
            continue
        identities = tolerance.same_results(replace(alone, o=o, o_t=o_t), alone, inputs, inputs)
        identities = [x for x in identities if x.quantity in ("o", "o_t")]
        found += [replace(x, quantity=f"{x.quantity} of duals beside {name}") for x in identities]
    return found


def _of_duals(inputs: Inputs, subject: Subject) -> tuple[Tensor, Tensor | None]:
    """o and its tangent by dual tensors, at the level that the other thread opened."""
    pairs = zip(operands(inputs)[:3], operands(inputs)[3:], strict=True)
    duals = [x if x_t is None else forward_ad.make_dual(x.detach(), x_t, level=0) for x, x_t in pairs]
    o, o_t = forward_ad.unpack_dual(subject.attention(inputs)(*duals), level=0)
    return o, o_t


@contextmanager
def _elsewhere(place: Callable[[Pause], object]) -> Iterator[None]:
    """While the block runs, another thread stays inside of `place`, which gets a function that waits there."""
    inside, leave = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def pause() -> None:
        inside.set()
        leave.wait()

    def run() -> None:
        try:
            place(pause)
        except BaseException as error:  # raised in the thread that waits
            failures.append(error)
        finally:
            inside.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()
    if failures:
        raise failures[0]


def _in_jvp(pause: Pause) -> None:
    """Pauses inside of a call that runs under func.jvp and has taken the tangents off its tensors."""

    def f(x: Tensor) -> Tensor:
        with eager.marked("below_jvp"):
            pause()
        return x.sin()

    jvp(f, (torch.ones(()),), (torch.ones(()),))


def _in_dual_level(pause: Pause) -> None:
    with forward_ad.dual_level():
        pause()
