"""flashjvp.checkpoint: the results and gradients of the function itself, at every level, and less memory."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint

import flashjvp
from tests.flashjvp.integrations.exact import normal

WEIGHT = normal(4, 4, seed=9).requires_grad_()
X, X_T, C, S = normal(5, 4), normal(5, 4, seed=1), normal(5, 4, seed=2), torch.tensor(0.7, dtype=torch.float64)
Block = Callable[..., Any]


def block(x: Tensor, c: Tensor, *, scale: float = 1.0) -> Any:
    """Nested outputs, of which some are no tensors and some have no tangent, and dropout."""
    h = F.dropout(torch.tanh(x @ WEIGHT) * c.sin() * scale, 0.3)
    return {"h": h, "rest": ("name", None, torch.arange(3), [h.square(), torch.ones(2), x > 0])}


def checkpointed(function: Block, *args: Any, **kwargs: Any) -> Any:
    return flashjvp.checkpoint(function, *args, **kwargs)


FORMS: dict[str, Callable[[Block, Tensor, Tensor], Any]] = {
    "arguments": lambda f, x, c: checkpointed(f, x, c, scale=0.9),
    "keywords": lambda f, x, c: checkpointed(f, x=x, c=c, scale=0.9),
    "reentrant": lambda f, x, c: checkpointed(functools.partial(f, scale=0.9), x, c, use_reentrant=True),
    "partial": lambda f, x, c: checkpointed(functools.partial(f, c=c, scale=0.9), x),
    "closure": lambda f, x, c: checkpointed(lambda x: f(x, c, scale=0.9), x),
    "closure alone": lambda f, x, c: checkpointed(lambda: (lambda x: f(x, c, scale=0.9))(x)),
    "closure in a partial, list in a closure": lambda f, x, c: (
        lambda held: checkpointed(functools.partial(lambda g, x: g(x), lambda x: f(x, held[0]["c"], scale=0.9)), x)
    )([{"c": c}]),
    "checkpoint in a checkpoint": lambda f, x, c: checkpointed(lambda x: checkpointed(f, x, c, scale=0.9), x),
    "options": lambda f, x, c: checkpointed(f, x, c, scale=0.9, preserve_rng_state=True, determinism_check="none"),
}


def of_func_jvp(net: Block) -> Any:
    return torch.func.jvp(net, (X, S), (X_T, torch.ones_like(S)))


def of_dual_level(net: Block) -> Any:
    with forward_ad.dual_level():
        s = forward_ad.make_dual(S, torch.ones_like(S))
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, X_T), s))


def of_nested_jvps(net: Block) -> Any:
    def inner(x: Tensor) -> Any:
        return torch.func.jvp(lambda s: net(x, s), (S,), (torch.ones_like(S),))

    (o, along_s), (along_x, along_both) = torch.func.jvp(inner, (X,), (X_T,))
    return o, along_s + along_x.sin() + along_both


def of_one_input(net: Block) -> Any:
    return torch.func.jvp(lambda s: net(X, s), (S,), (torch.ones_like(S),))


def of_none(net: Block) -> Any:
    o = net(X.clone().requires_grad_(), S)
    return o, o.square()


LEVELS = {
    "none": of_none, "func.jvp": of_func_jvp, "dual level": of_dual_level, "nested": of_nested_jvps,
    "one input": of_one_input,
}  # fmt: skip


def results(level: str, form: Callable[[Block, Tensor, Tensor], Any], seed: int = 3) -> list[Tensor]:
    def net(x: Tensor, s: Tensor) -> Tensor:
        out = form(block, x * 2, s * C)
        name, nothing, numbers, (square, ones, positive) = out["rest"]
        assert name == "name" and nothing is None and numbers.tolist() == [0, 1, 2]
        assert positive.dtype == torch.bool and torch.equal(ones, torch.ones(2))
        return out["h"] + square.cos()

    torch.manual_seed(seed)
    o, o_t = LEVELS[level](net)
    (gradient,) = torch.autograd.grad((o * C).sum() + (o_t * C.cos()).sum(), WEIGHT)
    return [o, o_t, gradient]


@pytest.mark.parametrize(
    ("level", "form"),
    # PyTorch's reentrant variant takes no part in torch.autograd.grad.
    [(level, form) for level in LEVELS for form in FORMS if (level, form) != ("none", "reentrant")],
)
def test_results_and_gradients_are_those_of_the_function(level: str, form: str) -> None:
    expected = results(level, lambda f, x, c: f(x, c, scale=0.9))
    found = results(level, FORMS[form])
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


def test_dropout_is_not_that_of_another_seed() -> None:
    """Else the test above would not see it."""
    first, second = (results("func.jvp", FORMS["arguments"], seed) for seed in (3, 4))
    assert not torch.equal(first[0], second[0])


def test_pytorchs_own_fails() -> None:
    """Why this is needed. When this fails, PyTorch has mended it."""
    with pytest.raises((torch_checkpoint.CheckpointError, NotImplementedError)):
        results("func.jvp", lambda f, x, c: torch_checkpoint.checkpoint(f, x, c, use_reentrant=False, scale=0.9))


@pytest.mark.parametrize("level", ["none", "func.jvp", "dual level"])
def test_nothing_inside_is_kept_and_all_is_computed_twice(level: str) -> None:
    calls, kept = [], []

    def function(x: Tensor, c: Tensor) -> Tensor:
        calls.append(1)
        for _ in range(4):
            x = torch.tanh(x @ WEIGHT) * c
        return x

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, o_t = LEVELS[level](lambda x, s: flashjvp.checkpoint(function, x, s * C))
    assert len(calls) == 1
    inside = len(kept)
    torch.autograd.grad(o.sum() + o_t.sum(), WEIGHT)
    assert len(calls) == 2
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        LEVELS[level](lambda x, s: function(x, s * C))
    assert inside < len(kept) / 2


def test_module_whose_parameters_have_tangents() -> None:
    module = nn.Linear(4, 4).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(
            Checkpointing(module), {f"module.{n}": p for n, p in parameters.items()}, (X,)
        )

    with pytest.raises(flashjvp.UnsupportedError, match=r"a module whose parameters have no tangents.*got a Linear"):
        torch.func.jvp(call, (parameters,), (parameters,))


class Checkpointing(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = flashjvp.checkpoint(self.module, x)
        return found


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_other_transforms_are_refused(transform: str) -> None:
    def f(x: Tensor) -> Tensor:
        found: Tensor = flashjvp.checkpoint(torch.sin, x)
        return found if transform == "vmap" else found.sum()

    with pytest.raises(flashjvp.UnsupportedError, match=rf"torch\.func\.jvp, got torch\.func\.{transform}"):
        getattr(torch.func, transform)(f)(X)


def test_a_pytorch_without_the_names_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashjvp._torch, "CAN_LEAVE_JVP", False)
    with pytest.raises(flashjvp.UnsupportedError, match=r"expected a PyTorch whose torch\.func\.jvp can be left"):
        results("func.jvp", FORMS["arguments"])
    assert torch.equal(
        results("dual level", FORMS["arguments"])[2], results("dual level", lambda f, x, c: f(x, c, scale=0.9))[2]
    )


def test_errors_of_the_function_come_through_and_the_level_is_entered_again() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    def f(x: Tensor) -> Tensor:
        with pytest.raises(ZeroDivisionError):
            flashjvp.checkpoint(fails, x)
        return x.sin()

    _, o_t = torch.func.jvp(f, (X,), (X_T,))
    assert torch.equal(o_t, X.cos() * X_T)


@pytest.mark.parametrize("jvp_inside", [False, True])
def test_compiled(jvp_inside: bool) -> None:
    def loss(x: Tensor, form: Callable[[Any, Tensor], Tensor]) -> Tensor:
        def net(x: Tensor) -> Tensor:
            return form(lambda x: torch.tanh(x @ WEIGHT).sin(), x)

        if not jvp_inside:
            return net(x).sum()
        o, o_t = torch.func.jvp(net, (x,), (x.cos(),))
        return (o * o_t).sum()

    compiled = torch.compile(lambda x: loss(x, flashjvp.checkpoint), backend="aot_eager")
    found, expected = (torch.autograd.grad(y, WEIGHT)[0] for y in (compiled(X), loss(X, lambda f, x: f(x))))
    torch.testing.assert_close(found, expected)
