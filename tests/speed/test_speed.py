"""Micro-benchmarks on the CPU, where `attention` takes the tiled backend: Triton's interpreter has no part in them.

Without --benchmark-enable each body runs once, untimed, and what it returns is checked. CONTRIBUTING.md has the
commands that store timings and compare with them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashjvp
from flashjvp.backends import reference, tiled

BACKENDS = {"tiled": tiled, "reference": reference}
SHAPES = {"long": (1, 2, 1024, 64), "short": (8, 4, 64, 64)}
TINY = (1, 1, 4, 8)
NO_MASK = (None, None, None)  # no tangent of one, no seed of dropout


def make(shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    """q, k, v, their tangents and two cotangents."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(8)]


def all_finite(results: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in results)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_forward_jvp(benchmark: Any, backend: str, shape: str, is_causal: bool) -> None:
    q, k, v, q_t, k_t, v_t, _, _ = make(SHAPES[shape])
    results = benchmark(BACKENDS[backend].forward_jvp, q, k, v, q_t, k_t, v_t, *NO_MASK, is_causal, 0.125, 0.0)
    assert len(results) == 4 and all_finite(results)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_jvp(benchmark: Any, backend: str, shape: str) -> None:
    *six, d_o, d_o_t = make(SHAPES[shape])
    module = BACKENDS[backend]
    statistics = module.forward_jvp(*six, *NO_MASK, False, 0.125, 0.0)
    wanted = (True,) * 6 + (False,) * 2
    grads = benchmark(module.backward_jvp, d_o, d_o_t, *six, *statistics, *NO_MASK, False, 0.125, 0.0, wanted)
    assert len(grads) == 8 and all_finite(grads[:6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_time_of_attention(benchmark: Any, backend: str) -> None:
    q, k, v = make(TINY)[:3]
    assert benchmark(flashjvp.attention, q, k, v, backend=backend).shape == TINY


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_time_of_attention_jvp(benchmark: Any, backend: str) -> None:
    assert all_finite(benchmark(flashjvp.attention_jvp, *make(TINY)[:6], backend=backend))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_host_time_of_both_passes(benchmark: Any, device: str) -> None:
    """What a training step pays for each call beyond the kernels; on a GPU the backend is triton."""
    *six, d_o, d_o_t = make(TINY, device)
    for x in six:
        x.requires_grad_()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(flashjvp.attention_jvp(*six), six, (d_o, d_o_t))

    assert all_finite(benchmark(both))


@pytest.mark.parametrize("transform", ["func", "plain"])
def test_host_time_of_forward_mode(benchmark: Any, transform: str) -> None:
    """The dispatcher's part: torch.func.jvp around attention, beside attention_jvp above."""
    q, k, v, q_t, k_t, v_t = make(TINY)[:6]
    calls: dict[str, Callable[[], Any]] = {
        "func": lambda: torch.func.jvp(flashjvp.attention, (q, k, v), (q_t, k_t, v_t)),
        "plain": lambda: (flashjvp.attention(q, k, v),),
    }
    assert all_finite(benchmark(calls[transform]))


@pytest.mark.parametrize("way", ["always", "jvp", "attention", "looking"])
def test_host_time_of_a_replaced_call(benchmark: Any, way: str) -> None:
    """What swapping costs, beside attention itself; "jvp" leaves this call to PyTorch.

    With "looking" the model has attention that no call comes from, for which each call is looked at.
    """
    q, k, v = make(TINY)[:3]
    if way == "attention":
        assert benchmark(lambda: flashjvp.attention(q, k, v)).shape == TINY
        return
    model = nn.MultiheadAttention(8, 2) if way == "looking" else None
    with flashjvp.replaced(model, when="jvp" if way == "jvp" else "always"):
        assert benchmark(lambda: F.scaled_dot_product_attention(q, k, v)).shape == TINY
