"""The context itself: what is replaced where, for whom, and that all is put back."""

import sys
import threading
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flashjvp
from flashjvp.integrations import active
from flashjvp.integrations.replaced import Replaced
from tests.flashjvp.integrations.calls import FUNCTIONS, Q, attention_calls, call
from tests.flashjvp.integrations.exact import normal

SOURCE = """
import functools
from torch.nn.functional import scaled_dot_product_attention, layer_norm as norm

TABLE = {"sdpa": scaled_dot_product_attention}
LIST = [norm]
PARTIAL = functools.partial(scaled_dot_product_attention, is_causal=True)

class Model:
    attend = scaled_dot_product_attention
    static = staticmethod(norm)
    def call(self, x, attend=scaled_dot_product_attention):
        return attend(x, x, x)

def call(x, *, attend=scaled_dot_product_attention):
    return attend(x, x, x)
"""


def module_of(source: str, name: str = "some_model") -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(source, module.__dict__)
    return module


@pytest.fixture
def client() -> Iterator[types.ModuleType]:
    yield module_of(SOURCE)
    sys.modules.pop("some_model", None)


def places(client: types.ModuleType) -> list[object]:
    return [
        client.scaled_dot_product_attention, client.norm, client.TABLE["sdpa"], client.LIST[0], client.PARTIAL.func,
        vars(client.Model)["attend"], vars(client.Model)["static"].__func__, client.Model.call.__defaults__[0],
        client.call.__kwdefaults__["attend"], F.scaled_dot_product_attention, F.layer_norm, torch.layer_norm,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is FUNCTIONS[0]
    assert F.layer_norm is FUNCTIONS[1] and torch.layer_norm is FUNCTIONS[2]
    assert active.present() is None


def test_every_reference_is_replaced_and_put_back(client: types.ModuleType) -> None:
    before = places(client)
    for _ in range(2):  # the second time from what was remembered
        with flashjvp.replaced() as replaced:
            assert not any(new is old for new, old in zip(places(client), before, strict=True))
            calls = (
                lambda: client.scaled_dot_product_attention(Q, Q, Q), lambda: client.TABLE["sdpa"](Q, Q, Q),
                lambda: client.PARTIAL(Q, Q, Q), lambda: client.Model().attend(Q, Q, Q),
                lambda: client.Model().call(Q), lambda: client.call(Q),
            )  # fmt: skip
            for one in calls:
                one()
            assert attention_calls(replaced) == len(calls)
            torch.testing.assert_close(client.Model().static(Q, (8,)), client.LIST[0](Q, (8,)))
        assert all(new is old for new, old in zip(places(client), before, strict=True))


def test_modules_that_are_loaded_later(client: types.ModuleType) -> None:
    with flashjvp.replaced() as replaced:
        later = module_of(SOURCE, "a_later_model")
        later.call(Q)
        assert attention_calls(replaced) == 1
    assert all(new is old for new, old in zip(places(later), places(client), strict=True))
    with flashjvp.replaced() as replaced:
        later.call(Q)
        assert attention_calls(replaced) == 1
    del sys.modules["a_later_model"]


def test_what_somebody_else_replaced_meanwhile_is_left_alone(client: types.ModuleType) -> None:
    def other(*_: object) -> None: ...

    with flashjvp.replaced():
        client.scaled_dot_product_attention = other
    assert client.scaled_dot_product_attention is other


def test_all_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), flashjvp.replaced():
        raise ZeroDivisionError
    with pytest.raises(flashjvp.ArgumentValueError, match="k: expected the head dim"), flashjvp.replaced():
        F.scaled_dot_product_attention(Q, Q[..., :3], Q)


def test_bad_arguments() -> None:
    with pytest.raises(flashjvp.ArgumentValueError, match=r"fallback: expected 'raise' or 'dense', got 'slow'"):
        flashjvp.replaced(fallback="slow")  # type: ignore[arg-type]
    with pytest.raises(flashjvp.ArgumentValueError, match=r"when: expected 'always' or 'jvp', got 'never'"):
        flashjvp.replaced(when="never")  # type: ignore[arg-type]
    with pytest.raises(flashjvp.ArgumentTypeError, match=r"model: expected an nn\.Module or None"):
        flashjvp.replaced(call)  # type: ignore[arg-type]


def test_nested_contexts_have_options_and_reports_of_their_own() -> None:
    with flashjvp.replaced() as outer:
        call()
        with flashjvp.replaced(when="jvp") as inner:
            call()
        call()
        with outer:
            call()
        call()
    assert [row.served_by for row in inner.report().rows] == ["PyTorch"]
    (row,) = outer.report().rows
    assert (row.served_by, row.calls) == ("flashjvp", 4)


def test_contexts_may_overlap_in_any_order() -> None:
    first, second = flashjvp.replaced(), flashjvp.replaced()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    call()
    second.__exit__(None, None, None)
    call()
    assert (attention_calls(first), attention_calls(second)) == (0, 1)


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_threads_follow_their_own_contexts(first_to_leave: int) -> None:
    entered, may_leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    contexts, after = [flashjvp.replaced(), flashjvp.replaced()], [None, None]

    def work(i: int) -> None:
        with contexts[i]:
            entered[i].set()
            may_leave[i].wait(60)
            call()
        call()
        after[i] = active.present()  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(60)
    assert F.scaled_dot_product_attention is not FUNCTIONS[0]
    assert active.present() is None  # this thread is in none
    torch.testing.assert_close(call(), FUNCTIONS[0](Q, Q, Q))
    for i in (first_to_leave, 1 - first_to_leave):
        assert F.scaled_dot_product_attention is not FUNCTIONS[0]
        may_leave[i].set()
        threads[i].join(60)
    assert [attention_calls(context) for context in contexts] == [1, 1]
    assert after == [None, None]


def test_install_is_for_all_threads_until_uninstall() -> None:
    installed = flashjvp.install()
    try:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
        with flashjvp.replaced() as inner:
            call()
        assert (attention_calls(installed), attention_calls(inner)) == (1, 1)
        second = flashjvp.install(when="jvp")
        call()
        assert [row.served_by for row in second.report().rows] == ["PyTorch"]
    finally:
        flashjvp.uninstall()
    flashjvp.uninstall()
    call()
    assert attention_calls(installed) == 1


def test_refused_attention_is_dense_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashjvp.dispatch import derivatives

    def refuses(*_: object) -> Tensor:
        raise flashjvp.UnsupportedError("q: expected something else, got this")

    monkeypatch.setattr(derivatives, "attention", refuses)
    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # the first query sees nothing
    with flashjvp.replaced(), pytest.raises(flashjvp.UnsupportedError, match="something else") as caught:
        call()
    assert "fallback='dense'" in caught.value.__notes__[0]
    with flashjvp.replaced(fallback="dense") as replaced:
        found = F.scaled_dot_product_attention(Q, Q[:, :1], Q[:, :1], mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, FUNCTIONS[0](Q, Q[:, :1], Q[:, :1], mask, scale=0.3, enable_gqa=True))
    (row,) = replaced.report().rows
    assert (row.served_by, row.why) == ("dense equations", "q: expected something else, got this")


def test_dense_equations_have_finite_derivatives_where_a_query_sees_nothing() -> None:
    from flashjvp.integrations import dense

    q = normal(2, 4, 3).requires_grad_()
    bias = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(), -torch.inf)
    o, o_t = torch.func.jvp(lambda q: dense.attention(q, q, q, bias, 0.0, False, None, False), (q,), (q.detach(),))
    (gradient,) = torch.autograd.grad(o.sum() + o_t.sum(), q)
    assert gradient.isfinite().all() and not o[:, 0].any() and not o_t[:, 0].any()


def test_dense_equations_in_a_dual_level_have_the_gradients_of_func_jvp() -> None:
    from flashjvp.integrations import dense

    q, w = normal(2, 4, 3), normal(3, 3).requires_grad_()
    bias = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(), -torch.inf)

    def f(q: Tensor) -> Tensor:
        return dense.attention(q @ w, q, q, bias, 0.0, False, None, False)

    with forward_ad.dual_level():
        o, o_t = forward_ad.unpack_dual(f(forward_ad.make_dual(q, q.sin())))
    assert o_t is not None
    found = torch.autograd.grad(o.sin().sum() + o_t.sin().sum(), w)
    o, o_t = torch.func.jvp(f, (q,), (q.sin(),))
    torch.testing.assert_close(found, torch.autograd.grad(o.sin().sum() + o_t.sin().sum(), w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [0, 5])
def test_dense_weights_are_rounded_once(dtype: torch.dtype, keys: int) -> None:
    from flashjvp.integrations import dense

    s = 10 * torch.randn(3, keys).to(dtype)
    torch.testing.assert_close(dense._softmax(s), s.softmax(-1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_recomputed_in_its_context_in_another_thread_after_its_end(reentrant: bool) -> None:
    q = Q.clone().requires_grad_()
    seen: list[Replaced | None] = []

    def block(q: Tensor) -> Tensor:
        seen.append(active.present())
        return F.scaled_dot_product_attention(q, q, q)

    with flashjvp.replaced() as replaced:
        o = checkpoint(block, q, use_reentrant=reentrant)
    thread = threading.Thread(target=lambda: o.sum().backward())
    thread.start()
    thread.join(60)
    assert seen == [replaced, replaced] and attention_calls(replaced) >= 1
    (expected,) = torch.autograd.grad(FUNCTIONS[0](q, q, q).sum(), q)
    torch.testing.assert_close(q.grad, expected)


def test_options_turn_norms_and_checkpoints_off() -> None:
    x = Q.clone().requires_grad_()
    with flashjvp.replaced(norms=False, checkpoint=False) as replaced:
        assert torch.equal(F.layer_norm(Q, (8,)), FUNCTIONS[1](Q, (8,)))
        checkpoint(torch.sin, x, use_reentrant=False)
    assert [row.served_by for row in replaced.report().rows] == ["PyTorch"]
