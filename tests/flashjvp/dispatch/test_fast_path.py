"""Calls like earlier ones skip the dispatcher, and their results and gradients stay those of the long way."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flashjvp
from flashjvp import ArgumentValueError, SecondOrderError
from tests.flashjvp.dispatch.calls import explicit, plain
from tests.flashjvp.dispatch.subjects import CountLaunches, Tensors, assert_same, tensors

BACKENDS = ("reference", "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_third_call_skips_the_dispatcher_and_gives_the_same(backend: str, dispatched: list[str]) -> None:
    x = tensors(1)
    first = explicit(x, backend), plain(x, backend)
    again = [(explicit(x, backend), plain(x, backend)) for _ in range(3)]
    assert dispatched == ["attention_jvp", "attention"] * 2
    for other in again:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    with CountLaunches():
        other = explicit(tensors(2), backend)
    torch.testing.assert_close(explicit(tensors(2), backend), other, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_long_way(backend: str, dispatched: list[str]) -> None:
    def gradients() -> Any:
        x = tensors(3).leaves()
        o, o_t = explicit(x, backend)
        first = torch.autograd.grad((o.sin() + o_t.cos()).sum(), x)
        return first, torch.autograd.grad(plain(x, backend).sin().sum(), x.primals)

    results = [gradients() for _ in range(5)]
    assert dispatched == ["attention_jvp", "attention"] * 2
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_wanted_by_each_call(backend: str, dispatched: list[str]) -> None:
    x = tensors(3).leaves()
    first = torch.autograd.grad([y.sum() for y in explicit(x, backend)], x)
    for _ in range(4):
        for wanted in ((True,) * 6, (False, True, False, True, True, False), (True,) + (False,) * 5):
            given = Tensors(*(y if want else y.detach() for y, want in zip(x, wanted, strict=True)))
            learned = [y for y in given if y.requires_grad]
            grads = torch.autograd.grad([y.sum() for y in explicit(given, backend)], learned)
            assert_same(list(grads), [grad for grad, want in zip(first, wanted, strict=True) if want])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_cotangent_stays_missing(backend: str, dispatched: list[str]) -> None:
    x = tensors(3).leaves()
    for _ in range(4):
        o, o_t = explicit(x, backend)
        both = torch.autograd.grad(o.sum() + o_t.sum(), x)
        o, o_t = explicit(x, backend)
        of_o = torch.autograd.grad(o.sum(), x, retain_graph=True)
        of_o_t = torch.autograd.grad(o_t.sum(), x)
        assert_same([a + b for a, b in zip(of_o, of_o_t, strict=True)], list(both))


def test_whether_a_graph_is_recorded_follows_the_grad_mode(dispatched: list[str]) -> None:
    x = tensors().leaves()
    for _ in range(3):
        explicit(x)
    assert explicit(x)[0].requires_grad
    with torch.no_grad():
        assert not any(y.requires_grad for y in explicit(x))
    for _ in range(3):
        assert not explicit(tensors())[0].requires_grad
    assert explicit(x)[1].requires_grad and explicit(Tensors(*tensors()[:5], x.v_t))[1].requires_grad


def test_second_order_is_refused_after_short_calls(dispatched: list[str]) -> None:
    x = tensors().leaves()
    for _ in range(4):
        o, o_t = explicit(x)
        torch.autograd.grad(o.sum() + o_t.sum(), x, retain_graph=True)
    (d_q,) = torch.autograd.grad((o * o).sum() + o_t.sum(), [x.q], create_graph=True)
    with pytest.raises(SecondOrderError):
        d_q.sum().backward()
    with forward_ad.dual_level(), pytest.raises(SecondOrderError):
        explicit(tensors()._replace(q=forward_ad.make_dual(x.q.detach(), x.q_t.detach())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (4, 7, 9)], ids=str)
def test_masks_of_fewer_dims_take_the_short_way(backend: str, shape: tuple[int, ...], dispatched: list[str]) -> None:
    """And give what a mask of all dims gives, derivatives included."""

    def gradients(seed: int, rank: int) -> Any:
        x, mask = tensors(seed).leaves(), torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
        o, o_t = explicit(x, backend, attn_mask=mask.view((1,) * (rank - len(shape)) + shape))
        return o, o_t, torch.autograd.grad((o.sin() + o_t.cos()).sum(), x)

    assert tensors().q.shape[:-1] == (2, 4, 7)
    exact = [gradients(seed, 4) for seed in range(4)]
    dispatched.clear()
    found = [gradients(seed, len(shape)) for seed in range(4)]
    assert dispatched == ["attention_jvp"]  # the key of the calls came before
    torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_short_ways_keep_no_tensor_alive(dispatched: list[str]) -> None:
    died = []
    for seed in range(4):
        x = tensors(seed).leaves()
        died += [weakref.ref(y) for y in (*x, *explicit(x))]
    del x
    gc.collect()
    assert not any(y() is not None for y in died)


def test_func_jvp_of_inputs_with_a_graph(dispatched: list[str]) -> None:
    x = tensors()
    expected, actual = x.leaves(), x.leaves()
    o, o_t = explicit(expected)
    wanted = torch.autograd.grad((o.sin() + o_t.cos()).sum(), expected)
    for _ in range(4):
        o, o_t = torch.func.jvp(lambda *z: plain(Tensors(*z, *z)), actual.primals, actual.tangents)
        assert_same(torch.autograd.grad((o.sin() + o_t.cos()).sum(), actual), wanted)
    with torch.no_grad():
        assert not any(y.requires_grad for y in torch.func.jvp(plain_of, actual.primals, actual.tangents))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive", "with a tangent"])
def test_func_jvp_of_what_stays_leaves_the_transform(kind: str, learned: bool, dispatched: list[str]) -> None:
    """Masks, and tensors from outside of the transform, which may have a graph there."""
    x, mask = tensors(1).leaves(), torch.rand(7, 9, dtype=torch.float64)
    mask = mask > 0.3 if kind == "bool" else mask.requires_grad_(learned)
    mask_t = mask.detach().cos() if kind == "with a tangent" else None
    leaves = [y for y in (*x.primals, x.q_t, mask) if y.requires_grad]

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return flashjvp.attention(q, x.k, x.v, mask, enable_gqa=True, backend="tiled")

    def results(o: Tensor, o_t: Tensor) -> Any:
        return o, o_t, torch.autograd.grad((o.sin() + o_t.cos()).sum(), leaves)

    expected = results(*explicit(Tensors(*x.primals, x.q_t, None, None), attn_mask=mask, attn_mask_t=mask_t))
    dispatched.clear()
    for _ in range(4):
        if mask_t is None:
            found = torch.func.jvp(lambda q: attend(q, mask), (x.q,), (x.q_t,))
        else:
            found = torch.func.jvp(attend, (x.q, mask), (x.q_t, mask_t))
        assert_same(results(*found), expected)
    assert dispatched == ["attention_jvp"]  # the key of the calls came before


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("mapped", [(0, 1, 2, 3, 4, 5), (0, 3), (4,)])
def test_vmap_is_left(mapped: tuple[int, ...], dim: int, dispatched: list[str]) -> None:
    """Whichever tensors it maps, over whichever dim; below it a call is as any other, gradients included."""
    entries = [tensors(seed) for seed in range(3)]
    mask = torch.rand(7, 9) > 0.3
    x = [torch.stack(one, dim) if i in mapped else one[0] for i, one in enumerate(zip(*entries, strict=True))]
    dims = tuple(dim if i in mapped else None for i in range(6))

    def results(given: list[Tensor], attend: Any) -> Any:
        o, o_t = attend(*given)
        return o, o_t, torch.autograd.grad((o.sin() + o_t.cos()).sum(), given)

    def one_by_one(*given: Tensor) -> Any:
        whole = [y if d is None else y.movedim(d, 0) for y, d in zip(given, dims, strict=True)]
        calls = [[y if d is None else y[i] for y, d in zip(whole, dims, strict=True)] for i in range(3)]
        return [torch.stack(y) for y in zip(*[explicit(Tensors(*call), attn_mask=mask) for call in calls], strict=True)]

    def explicitly(*given: Tensor) -> Any:
        return torch.vmap(lambda *y: explicit(Tensors(*y), attn_mask=mask), in_dims=dims)(*given)

    def by_jvp(*given: Tensor) -> Any:
        attend = lambda q, k, v: flashjvp.attention(q, k, v, mask, enable_gqa=True, backend="tiled")  # noqa: E731
        return torch.vmap(lambda *y: torch.func.jvp(attend, y[:3], y[3:]), in_dims=dims)(*given)

    leaves = [y.requires_grad_() for y in x]
    expected = results(leaves, one_by_one)
    for attend in (explicitly, by_jvp):
        for _ in range(2):
            results(leaves, attend)
        dispatched.clear()
        assert_same(results(leaves, attend), expected)
        assert not dispatched


def test_errors_under_vmap_speak_of_its_tensors() -> None:
    x = tensors()
    words = r"k: expected the head dim of q \[2, 4, 7, 6\], 6, got shape \[2, 2, 9, 5\]"
    with pytest.raises(ArgumentValueError, match=words):
        torch.vmap(lambda q: flashjvp.attention(q, x.k[..., :5], x.v, enable_gqa=True))(x.q[None])


def plain_of(*primals: Tensor) -> Tensor:
    return plain(Tensors(*primals, *primals))  # type: ignore[arg-type]
