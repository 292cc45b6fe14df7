"""One compiled case, run in a process of its own by test_compile.py: a failed trace leaves the dual level raised.

Usage: python -m tests.flashjvp.dispatch.compiled CASE BACKEND_OF_COMPILE
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import functional_call, grad, jvp

import flashjvp
from tests.flashjvp.dispatch.subjects import Tensors, assert_same, tensors


def plain(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return flashjvp.attention(q * 2, k, v, enable_gqa=True).sin().sum()


def plain_with_mask(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
    return flashjvp.attention(q * 2, k, v, attn_mask=mask, enable_gqa=True).sin().sum()


def explicit(*xs: Tensor) -> Tensor:
    o, o_t = flashjvp.attention_jvp(xs[0] * 2, *xs[1:], enable_gqa=True)
    return (o.sin() + o_t.cos()).sum()


def func_jvp(*xs: Tensor) -> Tensor:
    o, o_t = jvp(lambda q, k, v: flashjvp.attention(q.exp(), k, v, enable_gqa=True), xs[:3], xs[3:])
    return (o.sin() + o_t.cos()).sum()


def func_jvp_of_queries(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, *_: Tensor) -> Tensor:
    o, o_t = jvp(lambda q: flashjvp.attention(q, k, v, enable_gqa=True), (q,), (q_t,))
    return (o.sin() + o_t.cos()).sum()


def grad_of_jvp(*xs: Tensor) -> Tensor:
    first, second, third = grad(lambda q, k, v: func_jvp(q, k, v, *xs[3:]), argnums=(0, 1, 2))(*xs[:3])
    return first.sum() + second.sin().sum() + third.cos().sum()


def packed_projection(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, *_: Tensor) -> Tensor:
    """q, k, v as views of one tensor; the output goes back to [B, M, H * D] as a view."""
    packed = torch.stack((q, q * 2, q.cos()), 1).permute(0, 3, 1, 2, 4).contiguous()
    a, b, c = packed.permute(2, 0, 3, 1, 4).unbind(0)
    o, o_t = flashjvp.attention_jvp(a, b, c, q_t, None, a.sin(), is_causal=True)
    return (o.transpose(1, 2).flatten(-2).sin() + o_t.transpose(1, 2).flatten(-2).cos()).sum()


class Block(torch.nn.Module):
    """A projection before attention and one after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = torch.nn.Linear(6, 6, dtype=torch.float64)
        self.after = torch.nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q = self.before(x)
        return self.after(flashjvp.attention(q, q.sin(), x))


def module_jvp(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, *_: Tensor) -> Tensor:
    """The weights get real zero tangents: inductor fails on PyTorch's own lazy zeros ("ZeroTensors are immutable")."""
    weights = dict(BLOCK.named_parameters())
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    o, o_t = jvp(lambda weights, x: functional_call(BLOCK, weights, (x,)), (weights, q), (zeros, q_t))
    return (o.sin() + o_t.cos()).sum()


BLOCK = Block()
CASES: dict[str, Callable[..., Tensor]] = {
    case.__name__: case
    for case in (
        plain, plain_with_mask, explicit, func_jvp, func_jvp_of_queries, packed_projection, module_jvp, grad_of_jvp,
    )
}  # fmt: skip


def gradients(function: Callable[..., Tensor], leaves: Tensors) -> Any:
    inputs: Sequence[Tensor] = (*leaves, *BLOCK.parameters())
    loss = function(*leaves)
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True)


def check_case(case: Callable[..., Tensor], compiler: str) -> None:
    compiled = torch.compile(case, backend=compiler, fullgraph=True)
    if case is grad_of_jvp:  # its own reverse pass is inside; another would be second order
        assert_same(compiled(*tensors()), case(*tensors()))
    else:
        assert_same(gradients(compiled, tensors().leaves()), gradients(case, tensors().leaves()))


def check_dynamic_lengths(compiler: str) -> None:
    """A new sequence length does not compile a new graph, after the one that PyTorch makes for changing sizes."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(func_jvp, backend=counter, fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    for length in (8, 9, 31, 64):
        xs = [torch.randn(1, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(6)]
        actual, expected = compiled(*xs), func_jvp(*xs)
        assert_same(actual, expected)
        assert_same(torch.autograd.grad(actual, xs), torch.autograd.grad(expected, xs))
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for 4 lengths"


def check_compiled_autograd() -> None:
    leaves = tensors().leaves()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss = func_jvp(*leaves)
        loss.backward()
    assert_same([x.grad for x in leaves], list(gradients(func_jvp, tensors().leaves())[1][:6]))


if __name__ == "__main__":
    name, compiler = sys.argv[1:]
    torch.set_num_threads(1)
    if name == "dynamic_lengths":
        check_dynamic_lengths(compiler)
    elif name == "compiled_autograd":
        check_compiled_autograd()
    else:
        check_case(CASES[name], compiler)
    print("ok")
