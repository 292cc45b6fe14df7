"""What one thread differentiates is nobody else's: PyTorch counts dual levels for the whole process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp

import flashjvp
from tests.flashjvp.dispatch.subjects import assert_same, dense, tensors

X = tensors()


def func_jvp(inside: Callable[[], Any]) -> None:
    jvp(lambda x: (inside(), x)[1], (torch.ones(()),), (torch.ones(()),))


def dual_level(inside: Callable[[], Any]) -> None:
    with forward_ad.dual_level():
        inside()


@contextmanager
def another_thread(inside: Callable[[Callable[[], Any]], None]) -> Iterator[None]:
    """For as long, another thread is inside a JVP."""
    ready, done = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        assert done.wait(60)

    thread = threading.Thread(target=inside, args=(wait,))
    thread.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        done.set()
        thread.join()


def explicit_with_its_gradients() -> Any:
    leaves = X.leaves()
    o, o_t = flashjvp.attention_jvp(*leaves, enable_gqa=True)
    return o.detach(), o_t.detach(), torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), leaves)


def plain_with_its_gradients() -> Any:
    leaves = X.leaves()
    o = flashjvp.attention(*leaves.primals, enable_gqa=True)
    return o.detach(), torch.autograd.grad(o.sin().sum(), leaves.primals)


@pytest.mark.parametrize("other", [func_jvp, dual_level])
@pytest.mark.parametrize("call", [explicit_with_its_gradients, plain_with_its_gradients])
def test_calls_and_gradients_beside_a_jvp_of_another_thread(call: Callable[[], Any], other: Any) -> None:
    expected = call()
    for _ in range(3):
        with another_thread(other):
            assert_same(call(), expected)
    leaves = X.leaves()
    with another_thread(other):
        o, o_t = flashjvp.attention_jvp(*leaves, enable_gqa=True)
    with another_thread(other):
        torch.autograd.grad(o.sum() + o_t.sum(), leaves)


def test_tangents_are_kept_beside_a_func_jvp_of_another_thread() -> None:
    """Nested levels are refused by PyTorch, but a tensor may be dual at the level that another thread has opened."""
    expected = jvp(dense, X.primals, X.tangents)
    seen: list[Any] = []

    def in_the_level(wait: Callable[[], Any]) -> None:
        duals = [forward_ad.make_dual(x, x_t, level=0) for x, x_t in zip(X.primals, X.tangents, strict=True)]
        seen.append(tuple(forward_ad.unpack_dual(flashjvp.attention(*duals, enable_gqa=True), level=0)))
        wait()

    with another_thread(func_jvp):
        thread = threading.Thread(target=in_the_level, args=(lambda: None,))
        thread.start()
        thread.join()
    assert_same(seen, [expected])


def test_a_backward_pass_after_the_level_beside_one_of_another_thread() -> None:
    leaves = X.leaves()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x_t) for x, x_t in zip(leaves.primals, leaves.tangents, strict=True)]
        o, o_t = forward_ad.unpack_dual(flashjvp.attention(*duals, enable_gqa=True))
        assert o_t is not None
        with pytest.raises(flashjvp.SecondOrderError):
            torch.autograd.grad(o_t.sum(), leaves.q, retain_graph=True)
    with another_thread(dual_level):
        grads = torch.autograd.grad(o.sum() + o_t.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
