"""varlen: values and derivatives of each sequence are those of attention on it alone."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import flashjvp
from flashjvp import (
    ArgumentTypeError,
    ArgumentValueError,
    FlashJVPError,
    UnsupportedError,
    attention_varlen,
    attention_varlen_jvp,
    varlen,
)
from flashjvp.dispatch import derivatives
from flashjvp.kernels.launch import replaced
from flashjvp.operands import Operands, Options
from tests.flashjvp.forms import normal

H, D, DV = 4, 8, 3
LENGTHS: dict[str, tuple[list[int], list[int]]] = {
    "different": ([3, 5, 1, 7], [4, 5, 6, 2]),
    "equal": ([4, 4, 4], [6, 6, 6]),
    "groups": ([3, 5, 3, 5, 3], [4, 2, 4, 2, 1]),
    "empty ones": ([0, 3, 0, 2, 0], [2, 0, 0, 3, 5]),
    "many": ([2, 1] * 3, [3, 2] * 3),
    "one": ([6], [5]),
    "none": ([], []),
}


def cumulated(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def packed(of_q: Sequence[int], of_k: Sequence[int], kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    q, k = normal(sum(of_q), H, D, seed=1), normal(sum(of_k), kv_heads, D, seed=2)
    return q, k, normal(sum(of_k), kv_heads, DV, seed=3)


def alone(of_q: Sequence[int], of_k: Sequence[int], is_causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention written out, a sequence after the other."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        results = []
        for q_b, k_b, v_b in zip(q.split(of_q or [0]), k.split(of_k or [0]), v.split(of_k or [0]), strict=True):
            keep = torch.ones(len(q_b), len(k_b), dtype=torch.bool)
            keep = keep.tril(len(k_b) - len(q_b)) if is_causal else keep
            heads = q_b.shape[1] // k_b.shape[1]
            k_b, v_b = k_b.repeat_interleave(heads, 1), v_b.repeat_interleave(heads, 1)
            S = D**-0.5 * torch.einsum("mhd,nhd->hmn", q_b, k_b)
            P = torch.exp(S) * keep
            P = P / P.sum(-1, keepdim=True).clamp(min=1e-300)
            results.append(torch.einsum("hmn,nhd->mhd", P, v_b))
        return torch.cat(results)

    return attention


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", LENGTHS)
def test_each_sequence_is_as_it_is_alone(name: str, kv_heads: int, is_causal: bool, backend: str) -> None:
    """The last query is aligned with the last key; in both modes, and in reverse through both."""
    of_q, of_k = LENGTHS[name]
    inputs = [x.requires_grad_() for x in packed(of_q, of_k, kv_heads)]
    tangents = tuple(normal(*x.shape, seed=7 + i) for i, x in enumerate(inputs))
    cu_q, cu_k = cumulated(of_q), cumulated(of_k, torch.int64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen(q, k, v, cu_q, cu_k, is_causal=is_causal, enable_gqa=kv_heads != H, backend=backend)

    found = torch.func.jvp(call, tuple(inputs), tangents)
    expected = torch.func.jvp(alone(of_q, of_k, is_causal), tuple(inputs), tangents)
    assert found[0].shape == (sum(of_q), H, DV)
    assert_close(found, expected)
    grads = [torch.autograd.grad((o.sin() + o_t.cos()).sum(), inputs) for o, o_t in (found, expected)]
    assert_close(*grads)
    assert torch.equal(call(*inputs), found[0])


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("name", ["different", "empty ones", "many"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bits_are_those_of_a_sequence_alone(is_causal: bool, name: str, backend: str) -> None:
    """Of o, o_t and all gradients. Causal sequences have as many queries as keys here."""
    of_q, of_k = LENGTHS[name]
    of_k = of_q if is_causal else of_k
    inputs = [x.float().requires_grad_() for x in packed(of_q, of_k)]
    tangents = [normal(*x.shape, seed=7 + i).float().requires_grad_() for i, x in enumerate(inputs)]
    options: dict[str, Any] = {"is_causal": is_causal, "backend": backend}
    found = attention_varlen_jvp(*inputs, cumulated(of_q), cumulated(of_k), None, None, *tangents, **options)
    leaves = [*inputs, *tangents]
    grads = torch.autograd.grad(found, leaves, [x.detach().sin() for x in found])
    starts = list(zip([0, *accumulate(of_q)], of_q, [0, *accumulate(of_k)], of_k, strict=False))
    for first_q, rows, first_k, columns in starts[: len(of_q)]:
        places = [slice(first_q, first_q + rows), slice(first_k, first_k + columns), slice(first_k, first_k + columns)]
        alone = [x.detach()[rows].requires_grad_() for x, rows in zip(leaves, places * 2, strict=True)]
        results = flashjvp.attention_jvp(*[x.transpose(0, 1) for x in alone], **options)
        expected = [x.transpose(0, 1) for x in results]
        assert all(torch.equal(x[places[0]], y) for x, y in zip(found, expected, strict=True))
        of_alone = torch.autograd.grad(expected, alone, [x.detach().sin() for x in expected])
        assert all(torch.equal(x[place], y) for x, place, y in zip(grads, places * 2, of_alone, strict=True))


def test_a_packed_call_is_one_launch() -> None:
    of_q, of_k = LENGTHS["many"]
    launched = []
    with replaced.launch(lambda original, call, kernel, family, *rest, **options: launched.append(family)):
        attention_varlen(*[x.float() for x in packed(of_q, of_k)], cumulated(of_q), cumulated(of_k), backend="triton")
    assert launched == ["varlen_forward"]


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_rows_of_no_sequence_are_zeros_where_lengths_are_not_read(backend: str) -> None:
    """As on a GPU, whose numbers nobody reads."""
    q, k, v = (x.float() for x in packed([3, 2], [4, 1]))
    operands = Operands(q, k, v, mask=torch.tensor([[0, 3], [0, 4]]).int())
    o = derivatives.attention(operands, Options(False, None, f"varlen:{backend}"))
    assert o[3:].eq(0).all() and o[:3].ne(0).all()


def test_mapped_calls_share_their_lengths() -> None:
    of_q, of_k = LENGTHS["different"]
    q, k, v = packed(of_q, of_k)
    cu = cumulated(of_q), cumulated(of_k)
    several = torch.stack([q, 2 * q, -q])
    found = torch.vmap(lambda x: attention_varlen(x, k, v, *cu))(several)
    assert_close(found, torch.stack([attention_varlen(x, k, v, *cu) for x in several]))
    with pytest.raises(UnsupportedError, match="cu_q: expected the same lengths for all entries"):
        torch.vmap(lambda x, y: attention_varlen(q, k, v, x, y))(*[torch.stack([x, x]) for x in cu])


def test_options_reach_attention() -> None:
    of_q, of_k = LENGTHS["different"]
    q, k, v = packed(of_q, of_k)
    cu = cumulated(of_q), cumulated(of_k)
    for scale in (0.5, torch.tensor(0.5)):
        assert torch.equal(varlen(q, k, v, *cu, 7, 6, scale=scale), varlen(q, k, v, *cu, max_q=9, scale=0.5))
    assert_close(varlen(q, k, v, *cu, scale=0.5), varlen(q * 0.5 * D**0.5, k, v, *cu))


def test_a_compiled_caller_has_one_graph_and_other_lengths_are_right() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen, backend="eager", fullgraph=True)
    for of_q, of_k in (LENGTHS["different"], ([2, 6, 4, 4], [5, 3, 2, 7])):
        inputs, cu = packed(of_q, of_k), (cumulated(of_q), cumulated(of_k))
        assert_close(compiled(*inputs, *cu), attention_varlen(*inputs, *cu))
    with pytest.raises(ArgumentValueError, match="cu_q: expected cumulated lengths"):
        compiled(*inputs, cu[0].flip(0), cu[1])


def jagged(lengths: Sequence[int], heads: int, width: int, seed: int) -> Tensor:
    rows = normal(sum(lengths), heads, width, seed=seed)
    return torch.nested.nested_tensor_from_jagged(rows, cumulated(lengths, torch.int64))


@pytest.mark.parametrize("heads_first", [False, True])
def test_jagged_nested_tensors(heads_first: bool) -> None:
    """Results, tangents and gradients are those of their rows, and nested with the dims of q."""
    of_q, of_k = LENGTHS["different"]
    q, k = jagged(of_q, H, D, 1).requires_grad_(), jagged(of_k, 2, D, 2)
    v = torch.nested.nested_tensor_from_jagged(normal(sum(of_k), 2, DV, seed=3), k.offsets())
    given = [x.transpose(1, 2) if heads_first else x for x in (q, k, v)]
    o, o_t = attention_varlen_jvp(*given, q_t=given[0].detach(), is_causal=True, enable_gqa=True)
    assert torch.equal(attention_varlen(*given, is_causal=True, enable_gqa=True).values(), o.values())
    assert o.shape[:3] == given[0].shape[:3] and o.shape[3] == DV
    rows, rows_t = (x.transpose(1, 2).values() if heads_first else x.values() for x in (o, o_t))
    flat = [x.values().detach() for x in (q, k, v)]
    leaf = flat[0].requires_grad_()
    cu = cumulated(of_q), cumulated(of_k)
    expected = attention_varlen_jvp(
        *(leaf, *flat[1:]), *cu, q_t=flat[0].detach(), is_causal=True, enable_gqa=True
    )  # fmt: skip
    assert torch.equal(rows, expected[0]) and torch.equal(rows_t, expected[1])
    (rows.sum() + rows_t.sin().sum()).backward()
    assert q.grad is not None
    assert torch.equal(q.grad.values(), torch.autograd.grad(expected[0].sum() + expected[1].sin().sum(), leaf)[0])


def test_bad_nested_tensors() -> None:
    q, k = jagged([3, 2], H, D, 1), jagged([4, 1], H, D, 2)
    good: dict[str, Any] = {"q": q, "k": k, "v": k}
    strided = torch.nested.nested_tensor([normal(3, H, D), normal(2, H, D)], layout=torch.strided)
    for change, error, message in (
        ({"v": V}, ArgumentTypeError, "v: expected a nested tensor, as q is"),
        ({"cu_k": CU_K}, ArgumentValueError, "cu_k: expected None with nested tensors"),
        ({"v": jagged([3, 2], H, D, 2)}, ArgumentValueError, "v: expected the lengths of k, 2 sequences of 5 rows"),
        ({"q": strided}, UnsupportedError, "q: expected a nested tensor of layout torch.jagged"),
        (
            {"k": jagged([4, 1, 2], H, D, 2), "v": jagged([4, 1, 2], H, D, 2)},
            ArgumentValueError,
            "cu_k: expected as many",
        ),
    ):
        with pytest.raises(error) as caught:
            varlen(**{**good, **change})
        assert str(caught.value).startswith(message)


def test_one_function_by_two_names() -> None:
    assert varlen is attention_varlen


Q, K, V = packed([3, 2], [4, 1])
CU_Q, CU_K = cumulated([3, 2]), cumulated([4, 1])
BAD: list[tuple[dict[str, Any], type[FlashJVPError], str]] = [
    ({"q": None}, ArgumentTypeError, "q: expected a tensor"),
    ({"k": K[None]}, ArgumentValueError, "k: expected 3 dims"),
    ({"v": V[:4]}, ArgumentValueError, "v: expected as many rows as k, 5"),
    ({"cu_q": [0, 3, 5]}, ArgumentTypeError, "cu_q: expected a tensor"),
    ({"cu_q": CU_Q.float()}, ArgumentTypeError, "cu_q: expected a dtype of torch.int32 or torch.int64"),
    ({"cu_k": CU_K[None]}, ArgumentValueError, "cu_k: expected shape"),
    ({"cu_k": CU_K[:0]}, ArgumentValueError, "cu_k: expected shape"),
    ({"cu_k": CU_K.to("meta")}, ArgumentValueError, "cu_k: expected a tensor on the device of q or on the cpu"),
    ({"cu_q": CU_Q + 1}, ArgumentValueError, "cu_q: expected cumulated lengths that start at 0, got 1"),
    ({"cu_q": torch.tensor([0, 6, 5])}, ArgumentValueError, "cu_q: expected cumulated lengths, got 5 after 6"),
    ({"cu_q": torch.tensor([0, -1, 5])}, ArgumentValueError, "cu_q: expected cumulated lengths, got -1 after 0"),
    ({"cu_k": torch.tensor([0, 4, 6])}, ArgumentValueError, "cu_k: expected cumulated lengths that end at 5, got 6"),
    ({"cu_k": torch.tensor([0, 4])}, ArgumentValueError, "cu_k: expected cumulated lengths that end at 5, got 4"),
    ({"cu_k": torch.tensor([0, 4, 4, 5])}, ArgumentValueError, "cu_k: expected as many sequences as cu_q, 2"),
    ({"max_q": 2}, ArgumentValueError, "max_q: expected at least the 3 rows"),
    ({"max_k": 4.0}, ArgumentTypeError, "max_k: expected an int or None"),
    ({"is_causal": 1}, ArgumentTypeError, "is_causal: expected a bool"),
    ({"scale": torch.ones((), requires_grad=True)}, flashjvp.UnsupportedError, "scale: expected a number"),
    ({"k": K[..., :3]}, ArgumentValueError, "k: expected the head dim of q"),
    ({"backend": "flash"}, ArgumentValueError, "backend: expected"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_call(change: dict[str, Any], error: type[FlashJVPError], message: str) -> None:
    good = {"q": Q, "k": K, "v": V, "cu_q": CU_Q, "cu_k": CU_K}
    with pytest.raises(error) as caught:
        varlen(**{**good, **change})
    assert type(caught.value) is error and str(caught.value).startswith(message)
