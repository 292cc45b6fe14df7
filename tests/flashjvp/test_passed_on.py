"""What reaches the operators: arguments that agree as they are, others as views."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashjvp import attention, attention_jvp
from flashjvp.dispatch import derivatives, fast_path
from flashjvp.operands import Operands, Options
from tests.flashjvp.forms import DV, B, D, H, K, M, N, Q, V, qkv, some_keys

Calls = list[tuple[Operands, Options]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Operands and options of the calls to derivatives.attention and attention_jvp, which still do their work."""
    seen: Calls = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(operands: Operands, options: Options) -> Any:
            seen.append((operands, options))
            return function(operands, options)

        return called

    fast_path.forget()
    monkeypatch.setattr(derivatives, "attention", spy(derivatives.attention))
    monkeypatch.setattr(derivatives, "attention_jvp", spy(derivatives.attention_jvp))
    yield seen


def test_arguments_that_agree_are_passed_as_they_are(calls: Calls) -> None:
    q, k, v = qkv(Q, (B, 2, N, D), (B, 2, N, DV))
    mask = some_keys(1, H, 1, N)
    attention_jvp(q, k, v, q, None, v, mask, True, 0.5, True, backend="reference")
    ((operands, options),) = calls
    assert all(a is b for a, b in zip(operands, (q, k, v, q, None, v, mask, None, None), strict=True))
    assert options == Options(True, 0.5, "reference")


def test_scale_and_backend_are_left_open_by_default(calls: Calls) -> None:
    attention(*qkv(Q, K, V))
    attention(*qkv(Q, K, V), scale=2)
    (_, by_default), (_, given) = calls
    assert (by_default, given) == (Options(), Options(scale=2.0))
    assert isinstance(given.scale, float)


def test_broadcasting_makes_views(calls: Calls) -> None:
    q, k, v = qkv((1, B, H, M, D), (3, 1, 1, N, D), (1, 1, 1, N, DV))
    mask = some_keys(M, N)
    attention_jvp(q, k, v, None, k, v, mask, backend="reference")
    ((operands, _),) = calls
    q_, k_, v_, q_t, k_t, v_t, mask_, *_ = operands
    assert k_t is not None and v_t is not None and mask_ is not None
    assert q_.shape == (3, B, H, M, D) and k_.shape == (3, B, 1, N, D) and v_.shape == (3, B, 1, N, DV)
    assert q_t is None and k_t.shape == k_.shape and v_t.shape == v_.shape
    assert mask_.shape == (1, 1, 1, M, N)
    views = [(q_, q), (k_, k), (v_, v), (k_t, k), (v_t, v), (mask_, mask)]
    assert all(view.data_ptr() == x.data_ptr() for view, x in views)
    assert q_.stride(0) == k_.stride(1) == v_.stride(0) == v_.stride(1) == 0


def test_rank_2_is_one_head(calls: Calls) -> None:
    q, k, v = qkv((M, D), (N, D), (N, DV))
    o, o_t = attention_jvp(q, k, v, q, attn_mask=some_keys(M, N), backend="reference")
    assert o.shape == o_t.shape == (M, DV)
    ((operands, _),) = calls
    given = [x for x in operands if x is not None]
    assert [x.shape[0] for x in given] == [1] * 5
