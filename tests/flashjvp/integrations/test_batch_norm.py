"""Batch norm modules in training, which count their batches in place: right, and their buffers move as ever."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashjvp

from .exact import BAR, normal, normalised, worst

C = 3
SHAPES = {1: (4, C), 2: (2, C, 3, 4)}
FORWARD = (nn.BatchNorm2d.forward,)  # in a tuple, which is not replaced


class CountsAsWell(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, which has a forward pass of its own."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.after_counting()
        rest = self.weight, self.bias, True, self.momentum
        return scale * F.batch_norm(x, self.running_mean, self.running_var, *rest)

    def after_counting(self) -> None: ...


MODULES: dict[str, tuple[Callable[[], Any], int]] = {
    "images": (lambda: nn.BatchNorm2d(C), 2),
    "rows": (lambda: nn.BatchNorm1d(C), 1),
    "mean of all batches": (lambda: nn.BatchNorm2d(C, momentum=None), 2),
    "subclass": (lambda: CountsAsWell(C), 2),
    "no statistics": (lambda: nn.BatchNorm2d(C, track_running_stats=False), 2),
}


def of(name: str) -> tuple[Any, Tensor]:
    build, dims = MODULES[name]
    module = build().double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(C, seed=i)
    return module, normal(*SHAPES[dims], seed=5)


def written_out(module: Any) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:
        weight, bias = (y.view(1, -1, *(1,) * (x.ndim - 2)) for y in (module.weight, module.bias))
        return normalised(x, (0, *range(2, x.ndim)), weight, bias, module.eps)

    return norm


def by_jvp(norm: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(norm, (x,), (x.cos(),))


def by_nested_jvps(norm: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(lambda x: by_jvp(norm, x)[1], (x,), (x.sin(),))


def by_vmap_of_jvp(norm: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    along = torch.vmap(lambda x_t: torch.func.jvp(lambda x: norm(x).sin(), (x,), (x_t,))[1])
    return x, along(torch.stack([x.cos(), x.sin()]))


def by_checkpoint(norm: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return by_jvp(lambda x: torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False), x)


def objective(jvp: Callable[..., Any], norm: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Any:
    u, du = jvp(norm, x)
    loss = (u * du).sum() + du.square().sum() + du.sin().sum()
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    return {"u": u, "du": du, **{f"d {i}": gradient for i, gradient in enumerate(gradients)}}


def close(found: nn.Module, expected: nn.Module) -> None:
    for x, y in zip(found.buffers(), expected.buffers(), strict=True):
        assert x.grad_fn is None and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("jvp", [by_jvp, by_nested_jvps, by_checkpoint])
@pytest.mark.parametrize("name", MODULES)
def test_derivatives_and_statistics(name: str, jvp: Callable[..., Any]) -> None:
    module, x = of(name)
    plain = copy.deepcopy(module)
    expected = objective(by_jvp if jvp is by_checkpoint else jvp, written_out(module), module, x)
    for _ in range(2):  # once when the forward pass runs, once when a checkpoint is recomputed
        plain(x)
    with flashjvp.replaced():
        found = objective(jvp, module, module, x)
        if jvp is not by_checkpoint:
            jvp(module, x)
    assert worst(found, expected) < BAR
    close(module, plain)
    assert nn.BatchNorm2d.forward is FORWARD[0]


def test_mapped_over_tangents() -> None:
    module, x = of("images")
    with flashjvp.replaced():
        _, found = by_vmap_of_jvp(module, x)
    torch.testing.assert_close(found, by_vmap_of_jvp(written_out(module), x)[1])
    assert module.num_batches_tracked.item() == 1


def test_what_pytorch_counts_itself_it_does() -> None:
    """Without a transform, in a dual level, in evaluation, and a counter that a transform maps."""
    module, x = of("images")
    count = module.num_batches_tracked
    with flashjvp.replaced():
        module(x)
        with torch.autograd.forward_ad.dual_level():
            module(torch.autograd.forward_ad.make_dual(x, x))
        by_jvp(module.eval(), x)
        assert count is module.num_batches_tracked and count.item() == 2
        module.train()
        state = {name: torch.stack([y, y + 1]) for name, y in module.state_dict().items()}
        torch.vmap(lambda state: torch.func.functional_call(module, state, (x,)))(state)
    assert state["num_batches_tracked"].tolist() == [3, 4] and count.item() == 2


def test_without_norms_it_is_pytorchs() -> None:
    module, x = of("images")
    with flashjvp.replaced(norms=False), pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        by_jvp(module, x)


def test_an_error_leaves_the_module_as_it_was() -> None:
    module, x = of("images")
    count = module.num_batches_tracked
    with flashjvp.replaced(), pytest.raises(ValueError, match="expected 4D input"):
        by_jvp(module, x[0])
    assert module.num_batches_tracked is count and count.item() == 0


def test_threads_count_with_tensors_of_their_own() -> None:
    module, x = of("subclass")
    count, first_has_counted, second_is_through = module.num_batches_tracked, threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is thread:
            first_has_counted.set()
            assert second_is_through.wait(60)

    def work() -> None:
        with flashjvp.replaced():
            by_jvp(module, x)

    module.after_counting = wait
    thread = threading.Thread(target=work)
    thread.start()
    assert first_has_counted.wait(60)
    work()
    second_is_through.set()
    thread.join(60)
    assert module.num_batches_tracked is count and not torch._C._functorch.is_functorch_wrapped_tensor(count)
    assert count.item() == 2


def test_compiled() -> None:
    module, x = of("images")
    plain = copy.deepcopy(module)
    plain(x)
    expected = objective(by_jvp, written_out(module), module, x)
    torch._dynamo.reset()
    step = torch.compile(lambda x: by_jvp(module, x), backend="aot_eager", fullgraph=True)
    with flashjvp.replaced():
        found = objective(lambda _, x: step(x), module, module, x)
    assert worst(found, expected) < BAR
    close(module, plain)
