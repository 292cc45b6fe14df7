"""Block masks of flex attention: in every mode and on every backend, as the boolean masks that they mean."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.testing import assert_close

import flashjvp
from flashjvp import ArgumentValueError, attention, attention_jvp
from flashjvp.backends import block_plan
from flashjvp.backends.patterns import packed, unpacked
from tests.flashjvp.dense_masks import assert_same, kept
from tests.flashjvp.forms import normal

H, D, M, N = 4, 8, 150, 260
DOCUMENT_OF = torch.tensor([0] * 40 + [1] * 100 + [2] * 50 + [3] * 70)


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return DOCUMENT_OF[i] == DOCUMENT_OF[j]


def prefix(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | (j < 30)


def of_each(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Another one for each batch entry and head; the last queries see nothing."""
    return ((i + 11 * h) // 50 == (j - 30 * b) // 50) & (i < 140)


MASKS: dict[str, tuple[Any, int | None, int | None]] = {
    "documents": (documents, None, None),
    "prefix": (prefix, None, None),
    "of each": (of_each, 2, H),
    "of each head": (of_each, None, H),
}


def tensors(m: int = M, n: int = N, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and their tangents."""
    shapes = [(2, H, m, D), (2, kv_heads, n, D), (2, kv_heads, n, D)] * 2
    return [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


def both(name: str, blocks: Any = 128) -> tuple[BlockMask, Tensor]:
    """A block mask, and the boolean mask that it means."""
    function, entries, heads = MASKS[name]
    listed = create_block_mask(function, entries, heads, M, N, device="cpu", BLOCK_SIZE=blocks)
    return listed, create_mask(function, entries or 1, heads or 1, M, N, device="cpu")


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("blocks", [128, (64, 32), (256, 128), (100, 37)])
@pytest.mark.parametrize("name", MASKS)
def test_as_a_boolean_mask(name: str, blocks: Any, backend: str) -> None:
    inputs = tensors()
    listed, keep = both(name, blocks)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, listed, enable_gqa=True, backend=backend)

    assert_same(call, kept(keep), inputs[:3], inputs[3:])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", ["documents", "of each"])
def test_with_other_options(name: str, backend: str) -> None:
    """Causal, a window, and the same choices of dropout."""
    inputs, (listed, keep) = tensors(), both(name)
    for options in ({"is_causal": True}, {"window": (130, 60)}, {"is_causal": True, "window": (None, 60)}):
        same: dict[str, Any] = {**options, "enable_gqa": True, "backend": backend}
        results = []
        for mask in (listed, keep):
            torch.manual_seed(1)
            results.append(attention_jvp(*inputs, mask, dropout_p=0.3, **same))
        assert_close(*results)


@pytest.mark.parametrize("backend", ["tiled", "reference", "triton"])
@pytest.mark.parametrize("seen", ["every key", "none"])
def test_no_block_in_part(seen: str, backend: str) -> None:
    """All blocks are visible as a whole, or there are none, which gives zeros."""
    inputs = [x[:1, :1].float() for x in tensors(128, 256)[:3]]
    listed = create_block_mask(
        lambda b, h, i, j: (j >= 0) if seen == "every key" else (j < 0), None, None, 128, 256, device="cpu"
    )
    o = attention(*inputs, listed, backend=backend)
    assert_close(o, attention(*inputs) if seen == "every key" else torch.zeros_like(o))


@pytest.mark.pairwise
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.3}])
@pytest.mark.parametrize("name", ["documents", "of each head"])
def test_kernels(name: str, options: dict[str, Any]) -> None:
    """Blocks that are not visible, partly and as a whole; rows and keys in the last block are few."""
    function, _, heads = MASKS[name]
    leaves = [x[:1, :2].float().requires_grad_() for x in tensors(140, 150)]
    listed = create_block_mask(function, None, heads and 2, 140, 150, device="cpu")
    results = []
    for backend in ("triton", "tiled"):
        torch.manual_seed(1)
        results.append(attention_jvp(*leaves, listed, backend=backend, **options))
    assert_close(*results)
    cotangents = [x.detach().cos() for x in results[1]]
    assert_close(*[torch.autograd.grad(x, leaves, cotangents) for x in results])


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_blocks_that_are_not_listed_are_not_read(backend: str) -> None:
    q, k, v = (x[:1, :1].float() for x in tensors(20, 384)[:3])
    listed = create_block_mask(lambda b, h, i, j: (j >= 128) & (j < 256), None, None, 20, 384, device="cpu")
    for hidden in (slice(0, 128), slice(256, 384)):
        k[..., hidden, :], v[..., hidden, :] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, listed, backend=backend)
    d_q, d_k, d_v = torch.autograd.grad(o.sum(), leaves)
    assert o.isfinite().all() and d_q.isfinite().all()
    assert d_k[..., :128, :].eq(0).all() and d_v[..., 256:, :].eq(0).all() and d_v[..., 128:256, :].ne(0).all()


def test_a_mask_is_evaluated_once_and_freed_with_its_object() -> None:
    calls = []

    def counted(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        calls.append(1)
        return j <= i

    listed, inputs = create_block_mask(counted, None, None, M, N, device="cpu"), tensors(kv_heads=H)[:3]
    before = len(calls)
    first = attention(*inputs, listed)
    after = len(calls)
    assert after > before and torch.equal(attention(*inputs, listed), first) and len(calls) == after
    gc.collect()  # masks of tests before this one
    plan, known = weakref.ref(block_plan.plan_of(listed, M, N, None)), len(block_plan._KNOWN)
    flashjvp.dispatch.fast_path.forget()
    del listed
    gc.collect()
    assert plan() is None and len(block_plan._KNOWN) == known - 1


def test_every_way_of_a_call_gives_the_same_bits() -> None:
    """A first call, one like it, one under func.jvp, a compiled and a mapped one, also in inference mode before."""
    q, k, v, *tangents = tensors(kv_heads=H)
    listed, _ = both("of each")
    options: dict[str, Any] = {"attn_mask": listed, "backend": "tiled"}
    with torch.inference_mode():
        attention(q, k, v, **options)
    first = attention_jvp(q, k, v, *tangents, **options)
    for _ in range(3):
        assert all(map(torch.equal, attention_jvp(q, k, v, *tangents, **options), first))
        assert torch.equal(attention(q, k, v, **options), first[0])

    def call(*x: Tensor) -> Tensor:
        return attention(*x, **options)

    assert all(map(torch.equal, torch.func.jvp(call, (q, k, v), tuple(tangents)), first))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager")(q, k, v), first[0])
    several = [torch.stack([x, x]) for x in (q, k, v)]
    assert_close(torch.vmap(call)(*several)[1], first[0])


def test_bitmaps() -> None:
    tiles = normal(3, 128, 128) > 0
    assert torch.equal(unpacked(packed(tiles)), tiles)


def test_explained() -> None:
    found = flashjvp.explain(*tensors(kv_heads=H)[:3], attn_mask=both("prefix")[0])
    assert found.backend == "tiled"


def test_bad_block_masks() -> None:
    q, k, v = tensors(kv_heads=H)[:3]
    for change, message in (
        ({"q": q[..., :100, :]}, "attn_mask: expected a BlockMask of 100 queries and 260 keys, got one of 150 and 260"),
        ({"q": q[:, :2], "k": k[:, :2], "v": v[:, :2]}, "attn_mask: expected a BlockMask of 1 or 2 batch entries and"),
        ({"q": q[:1], "k": k[:1], "v": v[:1]}, "attn_mask: expected a BlockMask of 1 or 1 batch entries and"),
        ({"attn_mask": both("of each")[0].to("meta")}, "attn_mask: expected a BlockMask on the device of q, cpu, got"),
    ):
        good: dict[str, Any] = {"q": q, "k": k, "v": v, "attn_mask": both("of each")[0]}
        with pytest.raises(ArgumentValueError) as caught:
            attention(**{**good, **change})
        assert str(caught.value).startswith(message)
    with pytest.raises(ArgumentValueError, match="attn_mask_t"):
        attention_jvp(q, k, v, attn_mask=both("prefix")[0], attn_mask_t=q)
    wrong = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 2, dtype=torch.int32), torch.full((1, 1, 2, 3), 7, dtype=torch.int32), mask_mod=prefix,
        seq_lengths=(M, N), compute_q_blocks=False,
    )  # fmt: skip
    with pytest.raises(ArgumentValueError, match="attn_mask: expected blocks below 3"):
        attention(q, k, v, wrong)
