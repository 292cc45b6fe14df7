"""What a context does for the model that it is given, and what its report says of it."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flashjvp
from flashjvp.integrations import report
from tests.flashjvp.integrations.calls import FUNCTIONS, Q


class Switched(nn.Module):
    fused_attn: bool

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = False
        self.attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x) if self.fused_attn else x


class UntouchedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x


class SwitchedAttention(Switched):
    pass


def test_the_models_switches_and_functions_and_what_the_report_says() -> None:
    model = nn.Sequential(SwitchedAttention(), UntouchedAttention())
    with flashjvp.replaced(model) as replaced:
        model(Q)
        inside = flashjvp.replaced(model)
        inside.__enter__()
    assert model[0].fused_attn  # another context holds it
    inside.__exit__(None, None, None)
    assert model[0].fused_attn is False and model[0].attend.func is FUNCTIONS[0]
    report = replaced.report()
    assert (report.switched_on, report.reached, report.untouched) == (("0",), ("0",), ("1",))
    assert report.as_dict()["rows"][0]["calls"] == 1
    assert "1 x scaled_dot_product_attention: flashjvp (tiled, torch.float32 on cpu)" in str(report)
    assert "no call came from" in str(report)


class Gated(nn.Module):
    """Attention by another name, written out in methods; as timm's ConViT has it."""

    def weights(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ x


class ByEinsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...mn,...nd->...md", F.softmax(torch.einsum("...md,...nd->...mn", x, x), -1), x)


class Router(nn.Module):
    """A softmax, but no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(-1)


class Nothing(nn.Module):
    """Products, but no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT @ x


def test_attention_is_known_by_what_it_does_too() -> None:
    model = nn.Sequential(Gated(), ByEinsum(), Router(), Nothing(), nn.Linear(8, 8), nn.Softmax(-1))
    with flashjvp.replaced(model) as replaced:
        model(Q)
    assert replaced.report().untouched == ("0", "1")


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        return function(*args)

    return wrapper


class Core(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Cores(nn.Module):
    def __init__(self, *cores: nn.Module, registered: bool = True) -> None:
        super().__init__()
        self.cores: Any = nn.ModuleList(cores) if registered else cores

    def forward(self, x: Tensor) -> Tensor:
        for core in self.cores:
            x = core(x)
        return x


class AttentionOf(Cores):
    """Looks like attention; what attends are its parts."""


class MethodAttention(nn.Module):
    relu = functools.wraps(torch.relu)(lambda self, x: x)  # stands for a builtin

    @decorated
    def attend(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class CallsAMethod(Cores):
    def forward(self, x: Tensor) -> Tensor:
        return self.cores[0].attend(x)


class TransformedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(torch.vmap(Core()), x, use_reentrant=False)


CALLERS = {
    "parts": ("0", AttentionOf(Cores(Cores(Core())))),
    "a part that is not registered": ("0", AttentionOf(Core(), registered=False)),
    "a decorated method": ("0.cores.0", CallsAMethod(MethodAttention())),
    "within transforms": ("0", TransformedAttention()),
}


@pytest.mark.parametrize(("name", "attention"), CALLERS.values(), ids=CALLERS)
def test_which_module_calls_come_from(name: str, attention: nn.Module) -> None:
    """Also after many calls from elsewhere: from a module of the model, from others, from none.

    After those only some calls are looked at, so that it takes some until the module is seen.
    """
    model = nn.Sequential(attention, Core(), UntouchedAttention())
    elsewhere = (model[1], Cores(Cores(Cores(Core()))), Core().forward)
    with flashjvp.replaced(model) as replaced:
        for i in range(300):
            elsewhere[i % 3](Q)
        assert replaced.report_of.report().reached == ()
        for _ in range(100):
            model(Q)
    assert replaced.report_of.report().reached == (name,)


def test_the_first_calls_are_all_looked_at_and_all_calls_are_counted() -> None:
    model = nn.Sequential(*(MethodAttention() for _ in range(20)), UntouchedAttention())
    with flashjvp.replaced(model) as replaced:
        for part in model[:20]:
            part.attend(Q)
        assert replaced.report_of.report().untouched == ("20",)
        calls = report.MOST_CALLS + 100

        def call() -> None:
            for _ in range(calls // 2):
                F.scaled_dot_product_attention(Q[:1, :1], Q[:1, :1], Q[:1, :1])

        with flashjvp.replaced(model) as together:

            def in_thread() -> None:
                with together:
                    call()

            threads = [threading.Thread(target=in_thread) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert [row.calls for row in replaced.report_of.report().rows] == [20]
    for _ in range(2):
        assert [row.calls for row in together.report_of.report().rows] == [calls // 2 * 2]


def test_the_report_of_a_context_without_a_call() -> None:
    assert "no call was intercepted" in str(flashjvp.replaced().report())


def test_models_are_copied_and_pickled_inside() -> None:
    model = SwitchedAttention()
    with flashjvp.replaced(model):
        twin, stored = copy.deepcopy(model), pickle.dumps(model)
    for other in (twin, pickle.loads(stored)):
        other.fused_attn = True
        torch.testing.assert_close(other(Q), FUNCTIONS[0](Q, Q, Q, is_causal=True))


def test_a_context_keeps_no_model_alive() -> None:
    model = SwitchedAttention()
    gone = weakref.ref(model)
    with flashjvp.replaced(model):
        model(Q)
    del model
    gc.collect()
    assert gone() is None
