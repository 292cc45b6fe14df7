"""window: the keys around a query, in every mode and on every backend, as the boolean mask that it means."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, FlashJVPError, attention, attention_jvp
from tests.flashjvp.dense_masks import assert_same, kept
from tests.flashjvp.forms import normal

H, D = 4, 8
Window = tuple[int | None, int | None]
WINDOWS: list[Window] = [(3, 2), (None, 0), (5, None), (0, 0), (-1, 4), (100, 2**31 - 1)]


def tensors(m: int, n: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and their tangents."""
    shapes = [(2, H, m, D), (2, kv_heads, n, D), (2, kv_heads, n, D)] * 2
    return [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


def visible(m: int, n: int, window: Window, is_causal: bool = False) -> Tensor:
    left, right = (-1 if side is None else side for side in window)
    keep = torch.zeros(m, n, dtype=torch.bool)
    for i in range(m):
        for j in range(n):
            aligned = i + n - m
            inside = (left < 0 or j >= aligned - left) and (right < 0 or j <= aligned + right)
            keep[i, j] = inside and not (is_causal and j > i)
    return keep


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(13, 13), (9, 14), (14, 9)])
@pytest.mark.parametrize("window", WINDOWS)
def test_as_a_boolean_mask(window: Window, m: int, n: int, is_causal: bool, backend: str) -> None:
    """The last query is aligned with the last key; is_causal aligns the first ones."""
    inputs = tensors(m, n)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, is_causal=is_causal, enable_gqa=True, window=window, backend=backend)

    assert_same(call, kept(visible(m, n, window, is_causal)), inputs[:3], inputs[3:])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_with_masks_and_dropout(backend: str) -> None:
    """A boolean mask, a learned bias with a tangent, and the same choices of dropout."""
    inputs, keep = tensors(12, 15), visible(12, 15, (6, 3))
    mask = normal(2, 1, 12, 15, seed=8) > -0.5
    options: dict[str, Any] = {"enable_gqa": True, "backend": backend}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, window=(6, 3), **options)

    assert_same(call, kept(keep & mask), inputs[:3], inputs[3:])
    bias, bias_t = (normal(1, 1, 1, 15, seed=seed).requires_grad_() for seed in (6, 7))
    results = []
    for given, window in ((bias, (6, 3)), (bias.masked_fill(~keep, -torch.inf), None)):
        torch.manual_seed(1)
        given_t = bias_t.expand(given.shape)
        found = attention_jvp(*inputs, given, attn_mask_t=given_t, dropout_p=0.3, window=window, **options)
        results.append((found, torch.autograd.grad(found, [bias, bias_t], [x.detach().cos() for x in found])))
    assert_close(*results)


@pytest.mark.pairwise
@pytest.mark.parametrize("mask", [None, "additive"])
@pytest.mark.parametrize("window", [(20, 9), (None, 5), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize(("m", "n"), [(70, 20), (20, 80)])
def test_kernels(m: int, n: int, window: Window, mask: str | None) -> None:
    """Tiles before, at and behind both ends of the window, also in the gradient of a mask."""
    leaves = [x[:1, :2].float().requires_grad_() for x in tensors(m, n)]
    bias = None if mask is None else normal(m, n, seed=9).float().requires_grad_()
    leaves += [] if bias is None else [bias]
    found, expected = (
        attention_jvp(*leaves[:6], bias, enable_gqa=True, window=window, backend=backend)
        for backend in ("triton", "tiled")
    )
    assert_close(found, expected)
    grads = [torch.autograd.grad(x, leaves, [y.detach().cos() for y in expected]) for x in (found, expected)]
    assert_close(*grads)


@pytest.mark.parametrize(("backend", "m", "n"), [("tiled", 10, 5000), ("triton", 5, 300)])
def test_keys_far_from_the_window_are_not_read(backend: str, m: int, n: int) -> None:
    q, k, v = (x[:1, :1].float() for x in tensors(m, n)[:3])
    first = n - m - 30
    k[..., : first // 64 * 64, :], v[..., : first // 64 * 64, :] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, window=(20, 0), backend=backend)
    assert o.isfinite().all()
    d_q, d_k, d_v = torch.autograd.grad(o.sum(), leaves)
    assert d_q.isfinite().all() and d_k[..., :first, :].eq(0).all() and d_v[..., :first, :].eq(0).all()


def test_every_way_of_a_call_gives_the_same_bits() -> None:
    """A first call, one like it, one under func.jvp, a compiled and a mapped one, and rows before heads."""
    q, k, v, *tangents = tensors(12, 12, kv_heads=H)
    options: dict[str, Any] = {"window": (4, 1), "backend": "tiled"}
    first = attention_jvp(q, k, v, *tangents, **options)
    for _ in range(3):
        assert all(map(torch.equal, attention_jvp(q, k, v, *tangents, **options), first))
        assert torch.equal(attention(q, k, v, **options), first[0])

    def call(*x: Tensor) -> Tensor:
        return attention(*x, **options)

    assert all(map(torch.equal, torch.func.jvp(call, (q, k, v), tuple(tangents)), first))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(q, k, v), first[0])
    assert_close(torch.vmap(call)(q, k, v), first[0])
    rows_first = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attention(*rows_first, layout="bmhd", **options).transpose(1, 2), first[0])


def test_a_window_without_bounds_is_none() -> None:
    q, k, v = tensors(5, 7, kv_heads=H)[:3]
    assert torch.equal(attention(q, k, v, window=(None, -1)), attention(q, k, v))


def test_explained() -> None:
    q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="meta")
    found = flashjvp.explain(q, q, q, window=(64, 0), backend="triton")
    assert found.kernels == "warp-specialised" and not found.why_not_faster
    mask = torch.ones(256, 256, dtype=torch.bool, device="meta")
    found = flashjvp.explain(q, q, q, attn_mask=mask, window=(64, 0), backend="triton")
    assert found.kernels == "portable" and "a mask beside a window" in found.why_not_faster


BAD: list[tuple[Any, type[FlashJVPError], str]] = [
    (3, ArgumentTypeError, "window: expected None or a pair (left, right), got an object of type int"),
    ((1, 2, 3), ArgumentTypeError, "window: expected None or a pair (left, right), got 3"),
    ((1.0, 2), ArgumentTypeError, "window: expected two integers"),
    ((True, 2), ArgumentTypeError, "window: expected two integers"),
    ((-2, 2), ArgumentValueError, "window: expected numbers of keys"),
    ((0, 2**31), ArgumentValueError, "window: expected numbers of keys"),
]


@pytest.mark.parametrize(("window", "error", "message"), BAD)
def test_bad_window(window: Any, error: type[FlashJVPError], message: str) -> None:
    q, k, v = tensors(3, 3, kv_heads=H)[:3]
    for call in (attention, attention_jvp):
        with pytest.raises(error) as caught:
            call(q, k, v, window=window)
        assert str(caught.value).startswith(message)
