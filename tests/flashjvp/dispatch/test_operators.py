"""The dispatcher operators themselves: opcheck, fake strides, tensors that are not what their memory holds."""

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_map

from flashjvp.dispatch import derivatives, schema
from flashjvp.operands import Operands, Options

BACKENDS = ("reference", "tiled")


def canonical() -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 9, 6), torch.randn(2, 2, 9, 5)
    packed = torch.randn(2, 7, 4, 6).transpose(1, 2)
    return {"q": packed, "k": k, "v": v, "q_t": q, "k_t": None, "v_t": v.cos(), "mask": torch.rand(2, 1, 7, 9) > 0.2}


def leaf(x: Any) -> Any:
    return None if x is None else x.detach().requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_opcheck_of_the_forward_operators(backend: str, is_causal: bool) -> None:
    x = canonical()
    options = Options(is_causal, None, backend)
    six = tuple(leaf(x[name]) for name in ("q", "k", "v", "q_t", "k_t", "v_t"))
    operands = Operands(*six, x["mask"])
    opcheck(schema.FORWARD.handle, (*operands.plain, *options))
    opcheck(schema.FORWARD_JVP.handle, (*operands, *options))
    bias = torch.randn(x["mask"].shape, dtype=six[0].dtype)
    seed, dropped = torch.tensor(3), options._replace(dropout_p=0.5)
    opcheck(schema.FORWARD_JVP.handle, (*Operands(*six, leaf(bias), leaf(bias), seed), *dropped))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cotangents", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward_operators(backend: str, cotangents: tuple[bool, bool]) -> None:
    x = canonical()
    six = tuple(x[name] for name in ("q", "k", "v", "q_t", "k_t", "v_t"))
    rest = (x["mask"], None, None)
    options = Options(False, 0.3, backend)
    o, o_t, lse, mu = schema.FORWARD_JVP.handle(*six, *rest, *options)
    d_o, d_o_t = (torch.randn_like(o) if given else None for given in cotangents)
    wanted = [True, False, True, True, False, True, False, False]
    opcheck(schema.BACKWARD_JVP.handle, (d_o, d_o_t, *six, o, o_t, lse, mu, *rest, *options, wanted))
    if d_o is not None:
        opcheck(schema.BACKWARD.handle, (d_o, *six[:3], o, lse, x["mask"], None, *options, [*wanted[:3], False]))


def negated(x: torch.Tensor) -> torch.Tensor:
    """-x, as a view of x that PyTorch negates lazily."""
    return torch._neg_view(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_graph", [False, True])
def test_lazily_negated_tensors(backend: str, with_graph: bool) -> None:
    """Their memory holds other numbers: what reads memory must never get them."""
    x = canonical()
    six = [x[name] for name in ("q", "k", "v", "q_t", "k_t", "v_t")]

    def results(*negative: Any) -> Any:
        inputs = [leaf(x) if with_graph else x for x in negative]
        o, o_t, *_ = schema.FORWARD_JVP.handle(*Operands(*inputs), *Options(backend=backend))
        if not with_graph:
            return o, o_t
        leaves = [x for x in inputs if x is not None]
        cotangents = negated(o.detach()), negated(o_t.detach())
        return o, o_t, *torch.autograd.grad((o, o_t), leaves, cotangents)

    lazy = results(*(x if x is None else negated(x) for x in six))
    torch.testing.assert_close(lazy, results(*(x if x is None else -x for x in six)))


class Seen(torch.Tensor):
    """A tensor that remembers the operators it took part in, also where only a tangent is one."""

    names: ClassVar[list[str]] = []
    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Seen":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Seen.names.append(func._opname)
        held, options = tree_map(lambda x: x.held if isinstance(x, Seen) else x, (args, kwargs or {}))
        return tree_map(lambda x: Seen(x) if isinstance(x, torch.Tensor) else x, func(*held, **options))


@pytest.mark.parametrize("place", [0, 2, 3, 5])
@pytest.mark.parametrize("with_graph", [False, True])
def test_a_tensor_subclass_sees_the_operator(place: int, with_graph: bool) -> None:
    x = canonical()
    six = [x[name] for name in ("q", "k", "v", "q_t", "k_t", "v_t")]
    expected = schema.FORWARD_JVP.handle(*Operands(*six), *Options(backend="reference"))
    if with_graph:
        six = [leaf(x) for x in six]
    six[place] = Seen(six[place].detach())
    Seen.names.clear()
    actual = schema.FORWARD_JVP.handle(*Operands(*six), *Options(backend="reference"))
    assert "forward_jvp" in Seen.names
    assert all(isinstance(x, Seen) for x in actual)
    torch.testing.assert_close([x.held for x in actual], list(expected))


def test_a_tangent_that_is_a_subclass_sees_the_operator() -> None:
    x = canonical()
    Seen.names.clear()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x["q"], Seen(x["q_t"].mT.contiguous().mT))
        derivatives.attention(Operands(dual, x["k"], x["v"]), Options(backend="reference"))
    assert "forward_jvp" in Seen.names
