"""The wiring over the compiled kernels: launches, compilation by torch.compile and by Triton, devices and streams."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import flashjvp
from tests.flashjvp.dispatch.subjects import launches
from verify.budget.tolerance import assert_within
from verify.cases.inputs import Inputs
from verify.oracles.attention import NAMES, Results

pytestmark = pytest.mark.gpu


def inputs(length: int, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    torch.manual_seed(length)
    q, k, v, q_t, k_t, v_t, d_o, d_o_t = torch.randn(8, 2, 4, length, width, device="cuda").to(dtype)
    return Inputs(q, k, v, q_t, k_t, v_t, d_o=d_o, d_o_t=d_o_t)


def through_func_jvp(*xs: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(flashjvp.attention, xs[:3], xs[3:])


def results(function: Any, x: Inputs) -> Results:
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.q_t, x.k_t, x.v_t)]
    o, o_t = function(*leaves)
    return Results(o, o_t, *torch.autograd.grad((o, o_t), leaves, (x.d_o, x.d_o_t)))


def assert_bit_equal(a: Results, b: Results) -> None:
    for name in NAMES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("function", [through_func_jvp, flashjvp.attention_jvp], ids=["func.jvp", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_forward_and_one_backward_launch_within_budget(function: Any, dtype: torch.dtype) -> None:
    x = inputs(200, dtype=dtype)
    with launches() as names:
        actual = results(function, x)
    assert names == ["forward_jvp", "backward_jvp"]
    assert_within(x, actual)


@pytest.mark.filterwarnings("error:Dynamo detected")  # of functions of ours that it does not trace as they are
@pytest.mark.parametrize("function", [through_func_jvp, flashjvp.attention_jvp], ids=["func.jvp", "explicit"])
def test_compiled_by_inductor_equals_eager(function: Any) -> None:
    x = inputs(128)
    assert_bit_equal(results(torch.compile(function, fullgraph=True), x), results(function, x))


def compiled_kernels() -> int:
    """Of this process, of all families."""
    from flashjvp.kernels.launch import call

    return len(call._COMPILED)


@pytest.mark.parametrize("width", [64, 72])
def test_a_new_sequence_length_compiles_no_new_kernel(width: int) -> None:
    results(flashjvp.attention_jvp, inputs(64, width))
    before = compiled_kernels()
    assert before > 0
    for length in (1, 2, 31, 65, 128, 1000):
        results(flashjvp.attention_jvp, inputs(length, width))
    assert compiled_kernels() == before


def test_side_stream_and_autocast() -> None:
    x = inputs(96, dtype=torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        o, o_t = flashjvp.attention_jvp(x.q, x.k, x.v, x.q_t, x.k_t, x.v_t)
    torch.cuda.current_stream().wait_stream(stream)
    low = [t.bfloat16() for t in (x.q, x.k, x.v, x.q_t, x.k_t, x.v_t)]
    expected = flashjvp.attention_jvp(*low)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected[0]) and torch.equal(o_t, expected[1])


def test_a_captured_graph_replays() -> None:
    x = inputs(256)
    expected = results(flashjvp.attention_jvp, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(flashjvp.attention_jvp, x)
    graph.replay()
    torch.cuda.synchronize()
    assert_bit_equal(captured, expected)
