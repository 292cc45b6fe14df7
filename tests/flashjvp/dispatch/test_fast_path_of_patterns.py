"""Packed sequences, windows and block masks: calls like earlier ones skip the dispatcher, forward and backward, and no
check is lost by that."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.testing import assert_close

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flashjvp.dispatch import derivatives
from flashjvp.layout import empty_rows
from tests.flashjvp.forms import normal

H, D, ROWS = 4, 8, 9
CU_Q, CU_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 9], [0, 5, 9]))


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i < 4) == (j < 6)


def blocks(entries: int | None = None, heads: int | None = None) -> BlockMask:
    return create_block_mask(documents, entries, heads, ROWS, ROWS, device="cpu")


BLOCKS = blocks()


def packed(x: list[Tensor], cu_q: Any = CU_Q, cu_k: Any = CU_K, **options: Any) -> Any:
    tangents = dict(zip(("q_t", "k_t", "v_t"), x[3:], strict=False))
    function = flashjvp.attention_varlen_jvp if tangents else flashjvp.attention_varlen
    return function(*x[:3], cu_q, cu_k, **{"backend": "tiled", **tangents, **options})


def of_one_tensor(x: list[Tensor]) -> Any:
    return packed(x, CU_K, CU_K, is_causal=True)


def dense(x: list[Tensor], **options: Any) -> Any:
    function = flashjvp.attention_jvp if len(x) > 3 else flashjvp.attention
    return function(*x, **{"backend": "tiled", **options})


def windowed(x: list[Tensor]) -> Any:
    return dense(x, window=(2, 3))


def with_blocks(x: list[Tensor]) -> Any:
    return dense(x, attn_mask=BLOCKS)


KINDS: dict[str, Callable[[list[Tensor]], Any]] = {
    "packed": packed, "packed, one tensor of lengths": of_one_tensor, "window": windowed, "block mask": with_blocks
}  # fmt: skip


def tensors(kind: str, seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (ROWS, H, D) if kind.startswith("packed") else (1, H, ROWS, D)
    return [normal(*shape, seed=10 * seed + i).to(dtype).requires_grad_() for i in range(count)]


def results(kind: str, x: list[Tensor]) -> tuple[Any, ...]:
    """Outputs, and gradients of all inputs."""
    found = KINDS[kind](x)
    outputs = found if isinstance(found, tuple) else (found,)
    return *outputs, *torch.autograd.grad([o.sin().sum() for o in outputs], x)


@pytest.fixture
def dispatched_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Backward passes that take the dispatcher."""
    seen: list[str] = []
    original = derivatives.Gradients.__call__

    def called(self: Any, operator: Any, *rest: Any) -> Any:
        seen.append(operator.name)
        return original(self, operator, *rest)

    monkeypatch.setattr(derivatives.Gradients, "__call__", called)
    yield seen


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_gives_the_same(
    kind: str, count: int, dispatched: list[str], dispatched_backward: list[str]
) -> None:
    """And with other numbers what the long way gives for them."""
    others = tensors(kind, 1, count)
    first, of_others = results(kind, tensors(kind, 0, count)), results(kind, others)
    for _ in range(2):
        assert all(map(torch.equal, results(kind, tensors(kind, 0, count)), first))
    dispatched.clear()
    dispatched_backward.clear()
    assert all(map(torch.equal, results(kind, tensors(kind, 0, count)), first))
    assert all(map(torch.equal, results(kind, others), of_others))
    assert not dispatched and not dispatched_backward
    with torch.no_grad():
        assert not any(y.requires_grad for y in KINDS[kind](others))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_one_node(kind: str, dispatched: list[str]) -> None:
    """No view is recorded."""
    x = tensors(kind)
    for _ in range(3):
        o, o_t = KINDS[kind](x)
    assert o.grad_fn is o_t.grad_fn and o._base is None
    assert {type(node).__name__ for node, _ in o.grad_fn.next_functions if node} == {"AccumulateGrad"}
    (o.sum() + o_t.sum()).backward()
    assert all(y.grad is not None for y in x)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_the_short_way(kind: str, dispatched: list[str]) -> None:
    single = tensors(kind, dtype=torch.float32)

    def cast() -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(kind, single)

    first, wide = cast(), results(kind, single)
    for _ in range(2):
        cast(), results(kind, single)
    dispatched.clear()
    assert_close([cast(), results(kind, single)], [first, wide], rtol=0, atol=0)
    assert not dispatched and first[0].dtype == torch.bfloat16 and wide[0].dtype == torch.float32


def test_other_lengths_are_those_of_the_call(dispatched: list[str]) -> None:
    x, other = tensors("packed"), torch.tensor([0, 8, 9], dtype=torch.int32)
    expected = packed(x, other, CU_K)
    for _ in range(3):
        packed(x)
    dispatched.clear()
    assert all(map(torch.equal, packed(x, other, CU_K), expected))
    assert all(map(torch.equal, packed(x, max_q=6, max_k=7), packed(x)))
    assert not dispatched
    assert all(map(torch.equal, packed(x, other.long(), CU_K.long()), expected))
    assert all(map(torch.equal, packed(x, other.long(), CU_K), expected))


BAD: dict[str, tuple[type[Exception], str, Callable[[list[Tensor]], Any]]] = {
    "end": (ArgumentValueError, "cu_q: .* end at 9", lambda x: packed(x, torch.tensor([0, 3, 8]).int())),
    "start": (ArgumentValueError, "cu_k: .* start at 0", lambda x: packed(x, cu_k=torch.tensor([1, 5, 9]).int())),
    "order": (ArgumentValueError, "got 9 after 10", lambda x: packed(x, torch.tensor([0, 10, 9]).int())),
    "number": (ArgumentValueError, "as many sequences", lambda x: packed(x, cu_k=torch.tensor([0, 9]).int())),
    "dtype": (ArgumentTypeError, "cu_k: expected a dtype", lambda x: packed(x, cu_k=CU_K.float())),
    "list": (ArgumentTypeError, "cu_q: expected a tensor", lambda x: packed(x, [0, 3, 9])),
    "none": (ArgumentTypeError, "cu_q: expected a tensor", lambda x: packed(x, None)),
    "no other": (ArgumentTypeError, "cu_k: expected a tensor", lambda x: packed(x, CU_K, None, is_causal=True)),
    "longest": (ArgumentValueError, "max_q: expected at least", lambda x: packed(x, max_q=5)),
    "type of longest": (ArgumentTypeError, "max_k: expected an int", lambda x: packed(x, max_k=5.0)),
    "is_causal": (ArgumentTypeError, "is_causal", lambda x: packed(x, is_causal=0)),
    "scale": (ArgumentValueError, "scale", lambda x: packed(x, scale=float("inf"))),
    "backend": (ArgumentValueError, "backend", lambda x: packed(x, backend="")),
    "type of backend": (ArgumentTypeError, "backend", lambda x: packed(x, backend=Named())),
    "rows of v": (ArgumentValueError, "v: expected as many rows", lambda x: packed([*x[:2], x[2][:8], *x[3:5], None])),
    "tangent": (ArgumentValueError, "q_t", lambda x: packed([*x[:3], x[3][:8], *x[4:]])),
    "dims": (ArgumentValueError, "expected 3 dims", lambda x: packed([x[0][None], *x[1:]])),
}


class Named:
    def __str__(self) -> str:
        return "tiled"


@pytest.mark.parametrize("name", BAD)
def test_no_error_is_lost(name: str, dispatched: list[str]) -> None:
    kind, words, call = BAD[name]
    x = [y.detach() for y in tensors("packed")]
    for _ in range(3):
        packed(x)
        packed(x, scale=1.0)
        packed(x, backend=None)
        of_one_tensor(x)
    with pytest.raises(kind, match=words):
        call(x)


def test_a_block_mask_of_other_entries_is_refused(dispatched: list[str]) -> None:
    """Its plan is as long as that of one for each head."""
    x = [y[:, :2] for y in tensors("block mask")]
    for _ in range(3):
        dense(x, attn_mask=blocks(None, 2))
    with pytest.raises(ArgumentValueError, match="1 or 1 batch entries"):
        dense(x, attn_mask=blocks(2, None))


def test_mapped_lengths_are_compared(dispatched: list[str]) -> None:
    x = tensors("packed")
    expected = packed(x)
    for _ in range(3):
        packed(x)
    same = torch.vmap(lambda q: packed([q, *x[1:]]))(torch.stack([x[0], x[0]]))
    assert_close([y[1] for y in same], [*expected])
    with pytest.raises(UnsupportedError, match="cu_q: expected the same lengths for all entries"):
        torch.vmap(lambda cu: packed(x, cu))(torch.stack([CU_Q, CU_Q]))


def test_transforms_see_the_call(dispatched: list[str]) -> None:
    x = [y.detach() for y in tensors("packed")]
    expected = packed(x)
    for _ in range(3):
        packed(x), packed(x[:3])
    found = torch.func.jvp(lambda *y: packed([*y]), tuple(x[:3]), tuple(x[3:]))
    assert_close(found, expected)
    of_q = torch.func.grad(lambda q: packed([q, *x[1:]])[1].sin().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    (expected_of_q,) = torch.autograd.grad(packed([leaf, *x[1:]])[1].sin().sum(), leaf)
    assert_close(of_q, expected_of_q)


@pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 1)], ids=["none", "rows", "heads", "both"])
def test_gradients_lie_in_memory_as_the_fake_rules_say(dims: tuple[int, ...], dispatched: list[str]) -> None:
    """Also those of tensors that are broadcast over rows and heads."""
    q, k, v, q_t, k_t, v_t = tensors("packed")
    for dim in dims:
        k_t = k_t.narrow(dim, 0, 1)
    k_t = k_t.detach().expand(ROWS, H, D).requires_grad_()
    for _ in range(4):
        (grad,) = torch.autograd.grad([o.sum() for o in packed([q, k, v, q_t, k_t, v_t])], [k_t])
        assert grad.stride() == empty_rows(k_t, D).stride()
