"""layer_norm, batch_norm and instance_norm: PyTorch's numbers, and derivatives that are right to second order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional as F

import flashjvp
from flashjvp import norms
from tests.flashjvp.integrations import exact
from tests.flashjvp.integrations.exact import BAR, normal

Norm = Callable[..., Tensor]
CHANNELS = 3


def batch(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return flashjvp.batch_norm(x, None, None, w, b, training=True)


def instance(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return norms.instance_norm(x, w, b, None, None, True, 0.1, 1e-5)


def over_batch(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return exact.normalised(x, (0, *range(2, x.ndim)), *(of_channels(y, x) for y in (w, b)), 1e-5)


def over_instance(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return exact.normalised(x, tuple(range(2, x.ndim)), *(of_channels(y, x) for y in (w, b)), 1e-5)


def of_channels(y: Tensor | None, x: Tensor) -> Tensor | None:
    return None if y is None else y.view(1, -1, *(1,) * (x.ndim - 2))


def layer(dims: int) -> tuple[Norm, Norm]:
    return (
        lambda x, w, b: flashjvp.layer_norm(x, x.shape[-dims:], w, b),
        lambda x, w, b: exact.layer_norm(x, x.shape[-dims:], w, b),
    )


# The norm, the same written out, the shape of the input and that of weight and bias.
NORMS: dict[str, tuple[Norm, Norm, tuple[int, ...], tuple[int, ...]]] = {
    "layer": (*layer(1), (2, 4, 5), (5,)),
    "layer of one row": (*layer(1), (5,), (5,)),
    "layer of two dims": (*layer(2), (3, 4, 5), (4, 5)),
    "batch": (batch, over_batch, (4, CHANNELS), (CHANNELS,)),
    "batch of images": (batch, over_batch, (2, CHANNELS, 4, 5), (CHANNELS,)),
    "instance": (instance, over_instance, (2, CHANNELS, 6), (CHANNELS,)),
}
ALL = pytest.mark.parametrize("name", NORMS)


def arguments(name: str) -> tuple[Tensor, Tensor, Tensor]:
    _, _, shape, of_weight = NORMS[name]
    return normal(*shape, seed=1), normal(*of_weight, seed=2), normal(*of_weight, seed=3)


@ALL
@pytest.mark.parametrize(
    ("affine", "tangents"),
    [(True, which) for which in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1))] + [(False, (1, 0, 0))],
)
def test_gradients_through_a_jvp(name: str, affine: bool, tangents: tuple[int, ...]) -> None:
    found_norm, exact_norm, shape, _ = NORMS[name]
    inputs = [x.requires_grad_() for x in arguments(name)]
    which = [i for i, given in enumerate(tangents) if given]
    steps = [x.cos().detach().requires_grad_() for x in inputs]

    def through(norm: Norm) -> list[Tensor]:
        def along(*duals: Tensor) -> Tensor:
            given: list[Tensor | None] = list(inputs)
            for i, x in zip(which, duals, strict=True):
                given[i] = x
            x, w, b = given if affine else (given[0], None, None)
            return norm(x, w, b)

        o, o_t = torch.func.jvp(along, tuple(inputs[i] for i in which), tuple(steps[i] for i in which))
        loss = (o * normal(*shape, seed=4)).sum() + (o_t * normal(*shape, seed=5)).sum() + (o_t * o).square().sum()
        gradients = torch.autograd.grad(loss, [*inputs, *steps], allow_unused=True, materialize_grads=True)
        return [o, o_t, *gradients]

    pairs = list(zip(through(found_norm), through(exact_norm), strict=True))
    scale = max(y.norm() for _, y in pairs)
    assert max((x - y).norm() for x, y in pairs) < BAR * scale


@ALL
def test_hessian_vector_products_nested_jvps_and_maps(name: str) -> None:
    found_norm, exact_norm, *_ = NORMS[name]
    x, w, b = arguments(name)
    jvp, d = torch.func.jvp, x.cos()

    def results(norm: Norm) -> list[Tensor]:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            return norm(x, w, b).sin().square().sum()

        forward_over_reverse = jvp(torch.func.grad(loss, argnums=(0, 1)), (x, w), (d, w.cos()))[1]
        twice = jvp(lambda x: jvp(lambda x: loss(x, w), (x,), (d,))[1], (x,), (d.sin(),))
        mapped = torch.func.vmap(lambda x_t: jvp(lambda x: norm(x, w, b), (x,), (x_t,))[1])(torch.stack([d, d.sin()]))
        inside = jvp(lambda x: torch.func.vmap(lambda s: norm(x * s, w, b))(d.flatten()[:2]), (x,), (d,))[1]

        def tangent(x: Tensor, w: Tensor) -> Tensor:
            with dual_level():
                found: Tensor = unpack_dual(norm(make_dual(x, d), w, b)).tangent
                return found

        reverse_over_dual = torch.func.grad(lambda x, w: tangent(x, w).sin().sum(), argnums=(0, 1))(x, w)
        return [*forward_over_reverse, *twice, mapped, inside, tangent(x, w), *reverse_over_dual]

    for found, expected in zip(results(found_norm), results(exact_norm), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("of_weight", [None, torch.float32])
def test_values_and_dtypes_are_pytorchs(
    dtype: torch.dtype, autocast: torch.dtype | None, of_weight: torch.dtype | None
) -> None:
    x = normal(4, CHANNELS, 5).to(dtype)
    w = None if of_weight is None else normal(5).to(max((dtype, of_weight), key=lambda dtype: dtype.itemsize))
    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (lambda x: flashjvp.layer_norm(x, (5,), w), lambda x: F.layer_norm(x, (5,), w)),
        (lambda x: batch(x, None, None), lambda x: F.batch_norm(x, None, None, training=True)),
        (lambda x: instance(x, None, None), lambda x: F.instance_norm(x)),
    ]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        for found_norm, stock in pairs:
            expected = stock(x)
            assert torch.equal(found_norm(x), expected)
            o, o_t = torch.func.jvp(found_norm, (x,), (x.cos(),))
            assert o.dtype == o_t.dtype == expected.dtype
            eps = torch.finfo(o.dtype).eps
            assert (o - expected).norm() < 2 * eps * expected.norm()
            exactly = torch.func.jvp(stock, (x.double(),), (x.double().cos(),))[1] if w is None else None
            assert exactly is None or (o_t - exactly).norm() < 8 * eps * exactly.norm()


@pytest.mark.parametrize("form", ["none", "jvp", "nested", "compiled"])
def test_running_statistics_move_as_pytorchs(form: str) -> None:
    x = normal(4, CHANNELS, 5)

    def moved(norm: Norm) -> list[Tensor]:
        mean, var = normal(CHANNELS, seed=6), normal(CHANNELS, seed=7).square()

        def call(x: Tensor) -> Tensor:
            return norm(x, mean, var, training=True, momentum=0.3)

        if form == "jvp":
            torch.func.jvp(call, (x,), (x,))
        elif form == "nested":
            torch.func.jvp(torch.func.grad(lambda x: call(x).sin().sum()), (x,), (x,))
        else:
            (torch.compile(call, backend="aot_eager") if form == "compiled" and norm is not F.batch_norm else call)(x)
        return [mean, var]

    for found, expected in zip(moved(flashjvp.batch_norm), moved(F.batch_norm), strict=True):
        torch.testing.assert_close(found, expected)


def test_evaluation_is_pytorchs() -> None:
    x, mean, var = normal(4, CHANNELS), normal(CHANNELS, seed=1), normal(CHANNELS, seed=2).square()
    given = (x,), (x.cos(),)
    found = torch.func.jvp(lambda x: flashjvp.batch_norm(x, mean, var), *given)
    expected = torch.func.jvp(lambda x: F.batch_norm(x, mean, var), *given)
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, CHANNELS), (0, CHANNELS, 2), (2, 0, 2)], ids=str)
def test_without_a_number_there_is_nothing_to_normalise(shape: tuple[int, ...]) -> None:
    x, x_t = (torch.empty(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.ones(shape[1], dtype=torch.float64, requires_grad=True) if shape[1] else None
    o, o_t = torch.func.jvp(lambda x: batch(x, weight, None), (x,), (x_t,))
    assert o.shape == o_t.shape == shape
    found = torch.autograd.grad(o.sum() + o_t.sum(), [y for y in (x, x_t, weight) if y is not None])
    assert not any(grad.any() for grad in found)


def test_one_number_for_each_channel_is_refused() -> None:
    with pytest.raises(
        flashjvp.ArgumentValueError, match=r"input: expected more than one number .* got shape \[1, 3\]"
    ):
        batch(normal(1, CHANNELS), None, None)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(normal(1, CHANNELS), None, None, training=True)


def test_compiled_norms_are_right() -> None:
    x, w = normal(4, 5), normal(5).requires_grad_()

    def loss(norm: Norm, x: Tensor) -> Tensor:
        o, o_t = torch.func.jvp(lambda x: norm(x @ torch.diag(w), (5,)), (x,), (x.cos(),))
        return (o * o_t.square()).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(flashjvp.layer_norm, x)
    found, expected = (torch.autograd.grad(y, w) for y in (compiled, loss(exact.layer_norm, x)))
    torch.testing.assert_close(found, expected)
