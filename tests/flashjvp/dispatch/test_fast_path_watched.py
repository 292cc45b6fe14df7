"""Calls like earlier ones take the dispatcher where anything watches it: modes, profilers, transforms; errors stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, SecondOrderError, UnsupportedError
from tests.flashjvp.dispatch.calls import explicit, plain, warm
from tests.flashjvp.dispatch.subjects import Tensors, assert_same, launches, tensors


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


def test_autocast_takes_the_short_way(dispatched: list[str]) -> None:
    """Casts included, with their derivatives, whatever was seen of other grad modes and types of autocast."""
    single, mask = Tensors(*(x.float().requires_grad_() for x in tensors())), torch.rand(7, 9).half()

    def gradients(dtype: torch.dtype) -> Any:
        with torch.autocast("cpu", dtype):
            o, o_t = explicit(single, attn_mask=mask)
            explicit(Tensors(*(x.bfloat16() for x in single)), attn_mask=mask)
        return o, o_t, torch.autograd.grad((o.sin() + o_t.cos()).sum(), single)

    types = (torch.bfloat16, torch.float16)
    expected = [gradients(dtype) for dtype in types]
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert not explicit(single, attn_mask=mask)[0].requires_grad
        again = [gradients(dtype) for dtype in types]
    dispatched.clear()
    last = [gradients(dtype) for dtype in types]
    assert not dispatched and [o.dtype for o, _, _ in last] == [*types]
    torch.testing.assert_close([again, last], [expected, expected], rtol=0, atol=0)


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
        ArgumentValueError,
        lambda x: flashjvp.attention(*x.primals, None, 1.5, enable_gqa=True, backend="tiled"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_error_is_lost(name: str, dispatched: list[str]) -> None:
    warm()
    warm(scale=1.0)
    kind, call = WRONG[name]
    with pytest.raises(kind):
        call(tensors())


def test_a_mask_that_comes_to_need_a_gradient_gets_it(dispatched: list[str]) -> None:
    mask = torch.zeros(7, 9, dtype=torch.float64)[None, None]
    warm(attn_mask=mask)
    mask.requires_grad_()
    with torch.no_grad():
        warm(attn_mask=mask)
    explicit(tensors(), attn_mask=mask)[1].sin().sum().backward()
    assert mask.grad is not None and mask.grad.any()


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
