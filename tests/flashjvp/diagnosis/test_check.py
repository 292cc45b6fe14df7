"""How `flashjvp.check` takes models and inputs, what it raises, and that it leaves everything as it was."""

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashjvp
from flashjvp.diagnosis import advice

WIDTH = 8


class Conditioned(nn.Module):
    """Takes times, class labels that may be missing, and a flag; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(10, WIDTH)
        self.layer = nn.Linear(WIDTH + 1, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, scale: bool = False) -> dict[str, Any]:
        self.count = self.count + 1
        h = torch.cat([x, t[:, None]], -1)
        h = F.dropout(torch.sin(self.layer(h)), 0.3, self.training)
        h = h if y is None else h + self.labels(y)
        return {"sample": (2 * h if scale else h, None), "n": 3}


X, T, Y = torch.randn(3, WIDTH), torch.rand(3), torch.tensor([1, 2, 2])
ONES = torch.ones_like(T)


@pytest.mark.parametrize("inputs, tangents", [
    ((X, T, Y), (X, ONES, None)), ([X, T, None, True], [None, ONES, None, None]),
    ({"x": X, "t": T, "y": Y}, {"t": ONES}), ({"x": X, "t": T, "scale": True}, {"x": X, "t": None}),
])  # fmt: skip
def test_inputs_as_forward_takes_them(inputs: Any, tangents: Any) -> None:
    assert flashjvp.check(Conditioned(), inputs, tangents).ok


def test_several_networks_and_a_function() -> None:
    nets = nn.ModuleDict({"encoder": nn.Linear(WIDTH, WIDTH), "head": nn.LayerNorm(WIDTH)})
    report = flashjvp.check(nets, X, X, function=lambda m, x: m["head"](m["encoder"](x).sin()))
    assert [(one.path, one.severity) for one in report.findings] == [("head", "wrong")]


def test_a_model_without_trained_parameters_has_its_jvp_compared() -> None:
    report = flashjvp.check(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()).requires_grad_(False), X, X)
    assert [one.what for one in report.comparisons] == ["JVP"] and report.ok


def test_what_asks_for_short_numbers_is_compared_in_float64() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = x.float().square().mean(-1, keepdim=True, dtype=torch.float32).add(1e-5).rsqrt()
            return x * y.to(x.dtype) + x.to(torch.bfloat16)

    report = flashjvp.check(Rounds(), X, X)
    assert report.ok and max(one.uncertainty for one in report.comparisons) < torch.finfo(torch.float32).eps


def test_everything_stays_as_it_was() -> None:
    model = nn.Sequential(Conditioned(), nn.Identity())
    called: list[int] = []
    hook = model[0].register_forward_hook(lambda *_: called.append(1) and None)
    model[0].layer.weight.grad = torch.ones_like(model[0].layer.weight)
    model[0].labels.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    profile = sys.getprofile()
    modes = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), model.training
    torch.manual_seed(3)
    random.seed(3)
    numbers = torch.get_rng_state(), random.getstate()
    given = X.clone(), T.clone()
    flashjvp.check(model[0], (X, T, Y), (X, ONES, None), replaced=True)
    assert torch.equal(torch.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]
    assert (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), model.training) == modes
    assert sys.getprofile() is profile
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert not model[0].labels.weight.requires_grad and list(model[0]._forward_hooks) == [hook.id]
    assert torch.equal(X, given[0]) and torch.equal(T, given[1])
    with torch.no_grad():
        assert not flashjvp.check(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), X, X).ok
        assert not torch.is_grad_enabled()


def test_in_inference_mode_and_from_a_profiled_program() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU())
    with torch.inference_mode():
        assert not flashjvp.check(model, X, X).ok


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


TypeFault, ValueFault = flashjvp.ArgumentTypeError, flashjvp.ArgumentValueError
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a function as model": (lambda: flashjvp.check(torch.sin, X, X), TypeFault, "model"),  # type: ignore[arg-type]
    "no inputs": (lambda: flashjvp.check(linear(), None, X), TypeFault, "inputs"),  # type: ignore[arg-type]
    "no tangents": (lambda: flashjvp.check(linear(), X, (None,)), ValueFault, "tangents"),
    "too few tangents": (lambda: flashjvp.check(Conditioned(), (X, T), (X,)), ValueFault, "tangents"),
    "an unknown name": (
        lambda: flashjvp.check(linear(), {"input": X}, {"x": X}), ValueFault, "tangents",
    ),
    "a number as name": (lambda: flashjvp.check(linear(), {0: X}, {0: X}), TypeFault, "inputs"),  # type: ignore[dict-item]
    "a tuple for a dict": (lambda: flashjvp.check(linear(), {"input": X}, (X,)), TypeFault, "tangents"),
    "another shape": (lambda: flashjvp.check(linear(), X, X[:1]), ValueFault, r"tangents\[0\]"),
    "another dtype": (lambda: flashjvp.check(linear(), X, X.double()), TypeFault, r"tangents\[0\]"),
    "another device": (lambda: flashjvp.check(linear(), X, X.to("meta")), ValueFault, r"tangents\[0\]"),
    "a number as tangent": (lambda: flashjvp.check(linear(), X, (1.0,)), TypeFault, r"tangents\[0\]"),
    "tangents of labels": (
        lambda: flashjvp.check(Conditioned(), (X, T, Y), (X, ONES, Y)), TypeFault, r"tangents\[2\]",
    ),
    "inputs of another shape": (
        lambda: flashjvp.check(linear(), X[:, :3], X[:, :3]), ValueFault, "inputs",
    ),
    "an output without tensors": (
        lambda: flashjvp.check(linear(), X, X, function=lambda m, x: 3), TypeFault, "output",
    ),
    "a number as function": (
        lambda: flashjvp.check(linear(), X, X, function=3), TypeFault, "function",  # type: ignore[arg-type]
    ),
    "a number as flag": (
        lambda: flashjvp.check(linear(), X, X, detached=1), TypeFault, "detached",  # type: ignore[arg-type]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_a_model_that_cannot_be_copied() -> None:
    model = linear()
    model.kept = (line for line in "ab")  # type: ignore[assignment]
    with pytest.raises(flashjvp.ArgumentTypeError, match=r"copy\.deepcopy"):
        flashjvp.check(model, X, X)


def test_every_kind_has_advice() -> None:
    kinds = {value for name, value in vars(advice).items() if name.isupper() and isinstance(value, str)}
    not_kinds = {advice.REPLACED, advice.DETACHED_NORM, advice.HARMLESS_NORM, advice.NOTHING, advice.BY_FLASHJVP}
    assert set(advice.ADVICE) | {advice.SWITCH, advice.ATTENTION} == kinds - not_kinds
