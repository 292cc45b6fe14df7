"""Calls like earlier ones: they skip the dispatcher only where nothing watches it, and no check is lost."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, SecondOrderError, UnsupportedError
from flashjvp.dispatch import derivatives, fast_path
from tests.flashjvp.dispatch.subjects import CountLaunches, Tensors, assert_same, launches, tensors

BACKENDS = ("reference", "tiled")


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls that take the dispatcher."""
    seen: list[str] = []

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            seen.append(name)
            return function(*args)

        return called

    fast_path.forget()
    for name in ("attention", "attention_jvp"):
        monkeypatch.setattr(derivatives, name, spy(name, getattr(derivatives, name)))
    yield seen
    fast_path.forget()


def explicit(x: Tensors, backend: str = "tiled", **options: Any) -> tuple[Tensor, Tensor]:
    return flashjvp.attention_jvp(*x, **{"enable_gqa": True, "backend": backend, **options})


def plain(x: Tensors, backend: str = "tiled") -> Tensor:
    return flashjvp.attention(*x.primals, enable_gqa=True, backend=backend)


def warm(**options: Any) -> None:
    """Calls after which one like them takes the short way."""
    for seed in range(3):
        explicit(tensors(seed), **options)
        plain(tensors(seed))


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


class Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_every_operator(dispatched: list[str]) -> None:
    warm()
    with launches() as names:
        explicit(tensors())
        plain(tensors())
    assert names == ["forward_jvp", "forward"]
    with Watch() as watch:
        explicit(tensors())
    assert any("forward_jvp" in name for name in watch.names)


def test_a_dispatch_mode_sees_the_backward_operator() -> None:
    x = tensors().leaves()
    for _ in range(4):
        torch.autograd.grad(sum(y.sum() for y in explicit(x)), x)
    total = sum(y.sum() for y in explicit(x))
    with launches() as names:
        torch.autograd.grad(total, x)
    assert names == ["backward_jvp"]


def test_a_profiler_sees_every_operator(dispatched: list[str]) -> None:
    warm()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        explicit(tensors())
    assert any(event.name == "flashjvp::forward_jvp" for event in profile.events())


def test_fake_tensors_stay_fake(dispatched: list[str]) -> None:
    warm()
    with FakeTensorMode() as mode:
        o, o_t = explicit(Tensors(*map(mode.from_tensor, tensors())))
    assert type(o) is type(o_t) is not Tensor


def test_lazily_negated_tensors_are_read_as_they_are_meant(dispatched: list[str]) -> None:
    warm()
    x = tensors()
    lazy = x._replace(q=torch._neg_view(x.q))
    assert_same(explicit(lazy), explicit(x._replace(q=-x.q)))


def test_transforms_are_not_skipped(dispatched: list[str]) -> None:
    warm()
    x, y = tensors(1), tensors(2)
    both = Tensors(*(torch.stack(pair) for pair in zip(x, y, strict=True)))
    mapped = torch.vmap(lambda *z: explicit(Tensors(*z)))(*both)
    assert_same(mapped, tuple(torch.stack(pair) for pair in zip(explicit(x), explicit(y), strict=True)))
    assert_same(torch.func.jvp(lambda *z: plain(Tensors(*z, *z)), x.primals, x.tangents), explicit(x))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(x.primals, x.tangents, strict=True)]
        assert_same(tuple(forward_ad.unpack_dual(plain(Tensors(*duals, *duals)))), explicit(x))


def test_autocast_casts_and_backends_keep_their_types(dispatched: list[str]) -> None:
    half = Tensors(*(x.bfloat16() for x in tensors()))
    single = Tensors(*(x.float() for x in tensors()))
    expected, wide = explicit(half), explicit(single)
    for _ in range(4):
        torch.testing.assert_close(explicit(single), wide, rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(explicit(single), expected, rtol=0, atol=0)
            torch.testing.assert_close(explicit(half), expected, rtol=0, atol=0)


WRONG: dict[str, tuple[type[Exception], Callable[[Tensors], Any]]] = {
    "is_causal": (ArgumentTypeError, lambda x: explicit(x, is_causal=0)),
    "enable_gqa": (ArgumentTypeError, lambda x: explicit(x, enable_gqa=1)),
    "heads": (ArgumentValueError, lambda x: explicit(x, enable_gqa=False)),
    "scale": (ArgumentTypeError, lambda x: explicit(x, scale=[0.5])),
    "a bool as scale": (ArgumentTypeError, lambda x: explicit(x, scale=True)),
    "an infinite scale": (ArgumentValueError, lambda x: explicit(x, scale=float("inf"))),
    "backend": (ArgumentValueError, lambda x: explicit(x, backend="fast")),
    "type of backend": (ArgumentTypeError, lambda x: explicit(x, backend=["tiled"])),
    "dtype": (ArgumentTypeError, lambda x: explicit(x._replace(v_t=x.v_t.float()))),
    "device": (ArgumentValueError, lambda x: explicit(x._replace(k=x.k.to("meta")))),
    "shape": (ArgumentValueError, lambda x: explicit(x._replace(q_t=x.q_t[:1]))),
    "no tensor": (ArgumentTypeError, lambda x: explicit(x._replace(v=1.0))),  # type: ignore[arg-type]
    "no query": (ArgumentTypeError, lambda x: explicit(x._replace(q=None))),  # type: ignore[arg-type]
    "a list as query": (ArgumentTypeError, lambda x: explicit(x._replace(q=[1.0]))),  # type: ignore[arg-type]
    "sparse": (UnsupportedError, lambda x: explicit(x._replace(q=x.q.to_sparse()))),
    "dropout": (
        UnsupportedError,
        lambda x: flashjvp.attention(*x.primals, None, 0.5, enable_gqa=True, backend="tiled"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_error_is_lost(name: str, dispatched: list[str]) -> None:
    warm()
    warm(scale=1.0)
    kind, call = WRONG[name]
    with pytest.raises(kind):
        call(tensors())


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


def test_a_mask_that_comes_to_need_a_gradient_is_refused(dispatched: list[str]) -> None:
    mask = torch.zeros(7, 9, dtype=torch.float64)[None, None]
    warm(attn_mask=mask)
    mask.requires_grad_()
    with torch.no_grad():
        warm(attn_mask=mask)
    with pytest.raises(UnsupportedError):
        explicit(tensors(), attn_mask=mask)


def test_short_ways_keep_no_tensor_alive(dispatched: list[str]) -> None:
    died = []
    for seed in range(4):
        x = tensors(seed).leaves()
        died += [weakref.ref(y) for y in (*x, *explicit(x))]
    del x
    gc.collect()
    assert not any(y() is not None for y in died)


def test_without_guards_every_call_takes_the_dispatcher(dispatched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a PyTorch whose guards have moved."""
    monkeypatch.setattr("flashjvp._torch.TensorGuards", None)
    for seed in range(4):
        explicit(tensors(seed))
    assert dispatched == ["attention_jvp"] * 4


def test_func_jvp_leaves_the_transform_once(dispatched: list[str]) -> None:
    """Below it the explicit call is as any other, whatever transforms are further out."""
    x = tensors()
    expected = explicit(x)
    dispatched.clear()
    attend = lambda q, k, v: plain(Tensors(q, k, v, q, k, v))  # noqa: E731
    assert_same(torch.func.jvp(attend, x.primals, x.tangents), expected)
    one_sided = explicit(x._replace(k_t=torch.zeros_like(x.k), v_t=torch.zeros_like(x.v)))
    assert_same(torch.func.jvp(lambda q: attend(q, x.k, x.v), (x.q,), (x.q_t,)), one_sided)
    assert_same(torch.vmap(lambda *z: torch.func.jvp(attend, z[:3], z[3:]))(*(y[None] for y in x))[1][0], expected[1])
    assert "attention" not in dispatched
    with forward_ad._set_fwd_grad_enabled(False):  # which func.jvp turns on for itself alone
        assert_same(torch.func.jvp(attend, x.primals, x.tangents), expected)
    with pytest.raises(SecondOrderError):
        torch.func.jvp(lambda q: torch.func.jvp(attend, (q, x.k, x.v), x.tangents)[1], (x.q,), (x.q_t,))


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


def plain_of(*primals: Tensor) -> Tensor:
    return plain(Tensors(*primals, *primals))  # type: ignore[arg-type]
