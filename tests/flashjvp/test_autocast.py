"""Under autocast a call is that of the arguments cast; nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashjvp
from flashjvp import attention, attention_jvp
from tests.flashjvp.forms import DV, B, H, K, M, N, Q, V, normal, qkv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_is_a_cast_of_the_arguments(dtype: torch.dtype, given: torch.dtype, backend: str) -> None:
    q, k, v = (x.to(given) for x in qkv(Q, K, V))
    mask = normal(M, N).to(given)
    with torch.autocast("cpu", dtype=dtype):
        results = attention_jvp(q, k, v, q, k, v, mask, backend=backend)
        plain = attention(q, k, v, mask, backend=backend)
    c_q, c_k, c_v = (x.to(dtype) for x in (q, k, v))
    mask = mask if given == torch.float32 else mask.to(dtype)
    expected = attention_jvp(c_q, c_k, c_v, c_q, c_k, c_v, mask, backend=backend)
    assert plain.dtype == results[0].dtype == results[1].dtype == dtype
    assert torch.equal(plain, attention(c_q, c_k, c_v, mask, backend=backend))
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradients_under_autocast_are_those_of_the_cast(backend: str) -> None:
    inputs: Any = [x.float().requires_grad_() for x in (*qkv(Q, K, V), *qkv(Q, K, V))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, o_t = attention_jvp(*inputs, backend=backend)
        grads = torch.autograd.grad((o.float() + o_t.float()).square().sum(), inputs)
    o, o_t = attention_jvp(*(x.bfloat16() for x in inputs), backend=backend)
    expected = torch.autograd.grad((o.float() + o_t.float()).square().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("learned", [False, True])
def test_calls_like_earlier_ones_follow_the_type_of_autocast(learned: bool) -> None:
    x = [normal(1, 2, 6, 8, seed=i, dtype=torch.float32).requires_grad_(learned) for i in range(6)]
    for dtype in [torch.bfloat16] * 4 + [torch.float16] * 4 + [torch.bfloat16, None, torch.float16]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found = attention_jvp(*x)
        expected = attention_jvp(*[y.to(dtype) if dtype else y for y in x])
        assert all(map(torch.equal, found, expected)) and found[0].dtype == (dtype or torch.float32)
        if learned:
            cotangents = [torch.ones_like(y) for y in found]
            pair = [torch.autograd.grad(y, x, cotangents) for y in (found, expected)]
            assert all(map(torch.equal, *pair)) and pair[0][0].dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    inputs = qkv(Q, K, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(*inputs)
    assert torch.equal(o, attention(*inputs))


def test_autocast_makes_dtypes_agree() -> None:
    q, k, v = qkv(Q, K, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q.float(), k.bfloat16(), v.half()).dtype == torch.bfloat16
        with pytest.raises(flashjvp.ArgumentTypeError, match=r"^k: expected the dtype of q, torch.float64"):
            attention(q, k.float(), v.float())


def test_autocast_compiles_into_one_graph() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, backend="reference")

    torch._dynamo.reset()
    inputs = [x.float() for x in qkv(Q, K, V)]
    compiled = torch.compile(call, backend="eager", fullgraph=True)(*inputs)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, call(*inputs))


def test_fake_tensors_follow_autocast() -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = torch.empty(Q), torch.empty(K), torch.empty(V)
        o = attention(q, k, v)
    assert o.shape == (B, H, M, DV) and o.dtype == torch.bfloat16 and o.device.type == "cpu"
