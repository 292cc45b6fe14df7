"""xformers' and flash_attn's functions, by modules that stand for these packages, against dense attention."""

import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashjvp
from flashjvp.dispatch import derivatives
from tests.flashjvp.integrations.exact import BAR, normal

B, M, N, H, D = 2, 4, 6, 2, 8
STARTS_Q, STARTS_K = [0, 3, 4, 7], [0, 5, 7, 10]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> Any:  # fmt: skip
    return "stock"


def flash_attn_qkvpacked_func(qkv: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False) -> Any:
    return "stock"


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
) -> Any:  # fmt: skip
    return "stock"


def flash_attn_varlen_kvpacked_func(
    q: Any, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0
) -> Any:
    return "stock"


def of_release_3(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, sm_margin: int = 0) -> Any:
    return "stock"


def memory_efficient_attention(
    query: Any, key: Any, value: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None, *, op: Any = None,
    output_dtype: Any = None,
) -> Any:  # fmt: skip
    return "stock"


def unbind(x: Tensor, dim: int) -> Any:
    return "stock"


class Bias:
    """xformers' classes of masks: what of them is read."""

    def __init__(self) -> None:
        self.q_seqinfo, self.k_seqinfo = SimpleNamespace(seqstart_py=STARTS_Q), SimpleNamespace(seqstart_py=STARTS_K)


def bias(name: str) -> Any:
    return type(name, (Bias,), {})()


@pytest.fixture
def packages() -> Iterator[SimpleNamespace]:
    flash_attn, flash_attn_3 = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    xformers = types.ModuleType("xformers.ops")
    for function in (
        flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, flash_attn_varlen_kvpacked_func
    ):  # fmt: skip
        vars(flash_attn)[function.__name__] = function
    vars(flash_attn_3)["flash_attn_func"] = of_release_3
    vars(xformers).update(memory_efficient_attention=memory_efficient_attention, unbind=unbind)
    with pytest.MonkeyPatch.context() as patch:
        for module in (flash_attn, flash_attn_3, xformers):
            patch.setitem(sys.modules, module.__name__, module)
        yield SimpleNamespace(flash_attn=flash_attn, flash_attn_3=flash_attn_3, xformers=xformers)


def dense(mask: Tensor | None = None, scale: float | None = None) -> Attention:
    """Of [B, M, H, D]."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa).transpose(1, 2)

    return attention


def packed(causal: str = "") -> Attention:
    """Of [total, H, D], sequence by sequence."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for (a, b), (c, d) in zip(pairs(STARTS_Q), pairs(STARTS_K), strict=True):
            allowed = torch.ones(b - a, d - c, dtype=torch.bool).tril(
                {"": d, "top": 0, "bottom": d - c - b + a}[causal]
            )
            parts.append(dense(allowed)(q[None, a:b], k[None, c:d], v[None, c:d])[0])
        return torch.cat(parts)

    return attention


def pairs(starts: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))


BOTTOM = torch.ones(M, N, dtype=torch.bool).tril(N - M)
TOP = torch.ones(M, N, dtype=torch.bool).tril()
ADDITIVE = normal(B * H, M, N, seed=8)
CU_Q, CU_K = torch.tensor(STARTS_Q, dtype=torch.int32), torch.tensor(STARTS_K, dtype=torch.int32)
DENSE, PACKED = ((B, M, H, D), (B, N, H, D)), ((7, H, D), (10, H, D))
# What the model calls, what it means, the shapes of q and of k and v.
CALLS: dict[str, tuple[Callable[[Any], Any], Attention, tuple[Any, Any]]] = {
    "flash": (lambda p: p.flash_attn.flash_attn_func, dense(), DENSE),
    "flash, causal": (lambda p: functools.partial(p.flash_attn.flash_attn_func, causal=True), dense(BOTTOM), DENSE),
    "flash, scale by position": (
        lambda p: lambda q, k, v: p.flash_attn.flash_attn_func(q, k, v, 0.0, 0.3), dense(scale=0.3), DENSE
    ),
    "flash, fewer key heads": (
        lambda p: p.flash_attn.flash_attn_func, dense(), ((B, M, 4, D), (B, N, 2, D))
    ),
    "flash 3": (
        lambda p: lambda q, k, v: p.flash_attn_3.flash_attn_func(q, k, v, 0.3, True), dense(BOTTOM, 0.3), DENSE
    ),
    "flash, qkv": (
        lambda p: lambda q, k, v: p.flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2)), dense(),
        ((B, M, H, D), (B, M, H, D)),
    ),
    "flash, packed": (
        lambda p: lambda q, k, v: p.flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 3, 5), packed(), PACKED
    ),
    "flash, packed, causal": (
        lambda p: lambda q, k, v: p.flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 3, 5, causal=True),
        packed("bottom"), PACKED,
    ),
    "flash, packed kv": (
        lambda p: lambda q, k, v: p.flash_attn.flash_attn_varlen_kvpacked_func(
            q, torch.stack((k, v), 1), CU_Q, CU_K, 3, 5
        ), packed(), PACKED,
    ),
    "xformers": (lambda p: p.xformers.memory_efficient_attention, dense(), DENSE),
    "xformers, one head": (
        lambda p: p.xformers.memory_efficient_attention,
        lambda q, k, v: dense()(*(x.unsqueeze(2) for x in (q, k, v))).squeeze(2), ((B, M, D), (B, N, D)),
    ),
    "xformers, additive": (
        lambda p: functools.partial(p.xformers.memory_efficient_attention, attn_bias=ADDITIVE),
        dense(ADDITIVE.view(B, H, M, N)), DENSE,
    ),
    "xformers, causal": (
        lambda p: functools.partial(p.xformers.memory_efficient_attention, attn_bias=bias("LowerTriangularMask")),
        dense(TOP), DENSE,
    ),
    "xformers, causal at the bottom": (
        lambda p: functools.partial(
            p.xformers.memory_efficient_attention, attn_bias=bias("LowerTriangularFromBottomRightMask"), scale=0.2
        ), dense(BOTTOM, 0.2), DENSE,
    ),
    "xformers, packed": (
        lambda p: lambda q, k, v: p.xformers.memory_efficient_attention(
            q[None], k[None], v[None], bias("BlockDiagonalMask")
        )[0], packed(), PACKED,
    ),
    "xformers, packed, causal": (
        lambda p: lambda q, k, v: p.xformers.memory_efficient_attention(
            q[None], k[None], v[None], bias("BlockDiagonalCausalMask")
        )[0], packed("top"), PACKED,
    ),
}  # fmt: skip


def results(attention: Attention, shapes: tuple[Any, Any]) -> list[Tensor]:
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate((shapes[0], shapes[1], shapes[1]))]
    o, o_t = torch.func.jvp(attention, tuple(inputs), tuple(x.detach().cos() for x in inputs))
    return [o, o_t, *torch.autograd.grad((o * o_t).sum() + o.sin().sum(), inputs)]


@pytest.mark.parametrize("name", CALLS)
def test_calls_mean_the_same(packages: SimpleNamespace, name: str) -> None:
    call, exact, shapes = CALLS[name]
    assert call(packages)(*(normal(*shapes[min(i, 1)]) for i in range(3))) in ("stock", "s")
    with flashjvp.replaced() as replaced:
        found = results(call(packages), shapes)
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(exact, shapes)
    assert max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)) < BAR
    assert {row.served_by for row in replaced.report().rows} == {"flashjvp"}
    assert packages.flash_attn.flash_attn_func is FUNCTIONS[0]


FUNCTIONS = (flash_attn_func, memory_efficient_attention)  # in a tuple, which is not replaced


def test_what_has_no_meaning_here_is_refused(packages: SimpleNamespace) -> None:
    q = normal(B, M, H, D)
    refused: list[tuple[str, Callable[[], Any]]] = [
        (r"window_size=\(3, 0\)", lambda: packages.flash_attn.flash_attn_func(q, q, q, window_size=(3, 0))),
        ("class PagedMask", lambda: packages.xformers.memory_efficient_attention(q, q, q, bias("PagedMask"))),
        ("output_dtype", lambda: packages.xformers.memory_efficient_attention(q, q, q, output_dtype=torch.float32)),
        (r"shape \[1, 2, 4, 2, 8\]", lambda: packages.xformers.memory_efficient_attention(*[q[None]] * 3)),
    ]
    with flashjvp.replaced(fallback="dense") as replaced:
        for message, call in refused:
            with pytest.raises(flashjvp.UnsupportedError, match=message):
                call()
    assert sum(row.calls for row in replaced.report().rows if row.served_by == "refused") == len(refused)


@pytest.mark.parametrize("name", [name for name in CALLS if "packed" in name])
def test_packed_sequences_are_one_call_of_varlen_where_it_has_what_they_need(
    packages: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else, and where it refuses and dense equations are allowed, a call for each pair of lengths."""
    call, exact, shapes = CALLS[name]
    inputs = [normal(*shapes[min(i, 1)], seed=i) for i in range(3)]
    with flashjvp.replaced() as replaced:
        call(packages)(*inputs)
    one_call = name != "xformers, packed, causal"  # aligned at the top left, with other numbers of keys than queries
    assert [row.calls for row in replaced.report().rows] == [1 if one_call else 3]

    def refuses(*_: object, **__: object) -> Tensor:
        raise flashjvp.UnsupportedError("q: expected something else, got this")

    monkeypatch.setattr(derivatives, "attention", refuses)
    inputs = [x.float() for x in inputs]  # a call like an earlier one would not come by there
    with flashjvp.replaced(fallback="dense") as replaced:
        found = call(packages)(*inputs)
    torch.testing.assert_close(found, exact(*inputs))
    (row,) = replaced.report().rows
    assert (row.served_by, row.calls) == ("dense equations", 3)
    with flashjvp.replaced(), pytest.raises(flashjvp.UnsupportedError, match="something else"):
        call(packages)(*inputs)


def test_packed_sequences_with_dropout(packages: SimpleNamespace) -> None:
    """With values of one-hot rows, the output is weights: dropped, or as large as they would be, over the rest."""
    q, k = torch.zeros(7, H, D, dtype=torch.float64), torch.zeros(10, H, D, dtype=torch.float64)
    v = torch.cat([torch.eye(D, dtype=torch.float64)[: b - a] for a, b in pairs(STARTS_K)])[:, None].expand(10, H, D)
    with flashjvp.replaced():
        o = packages.flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 3, 5, 0.5)
        none = packages.flash_attn.flash_attn_varlen_func(q[:0], k[:0], v[:0], CU_Q[:1], CU_K[:1], 0, 0, 0.5)
    exact = packed()(q, k, v)
    assert not torch.equal(o, exact) and torch.equal(o, torch.where(o == 0, o, 2 * exact))
    assert none.shape == (0, H, D)


def test_calls_without_a_tangent_are_the_packages(packages: SimpleNamespace) -> None:
    q = normal(B, M, H, D)
    with flashjvp.replaced(when="jvp") as replaced:
        assert packages.flash_attn.flash_attn_func(q, q, q) == "stock"
        assert packages.xformers.memory_efficient_attention(q, q, q) == "stock"
        assert torch.equal(packages.xformers.unbind(q, 2)[0], q[:, :, 0])
    assert packages.xformers.unbind(q, 2) == "stock"
    assert {row.served_by for row in replaced.report().rows} == {"PyTorch"}
