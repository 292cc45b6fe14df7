"""The losses in float64 against a second implementation of their formulas, image by image on the dense network."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from tvm_ref.model.dit import DiT
from tvm_ref.objective import loss
from tvm_ref.objective.loss import Batch, LossConfig, Terms, make_batch
from tvm_ref.objective.time_sampling import TimeConfig
from verify.budget import tolerance
from verify.budget.network_tolerance import SIGNIFICANCE, network_budget, relative_error
from verify.oracles.network import tiny, trained
from verify.oracles.objectives import dense_terms

CONFIG = tiny(depth=1, image_size=4)
NONE = CONFIG.num_classes
FUNCTIONS: dict[str, Callable[..., Terms]] = {
    "tvm": partial(loss.tvm_loss, detach=False),
    "detached": partial(loss.tvm_loss, detach=True),
    "flow": loss.flow_loss,
    "meanflow": loss.meanflow_loss,
    "adaptive": partial(loss.meanflow_loss, adaptive_power=1.0),
    "imf": loss.improved_meanflow_loss,
    "scm": loss.consistency_loss,
    "shortcut": loss.shortcut_loss,
}


def networks(seed: int = 0, **changes: Any) -> tuple[DiT, DiT]:
    """A network and a target network."""
    return trained(replace(CONFIG, **changes), seed), trained(replace(CONFIG, **changes), seed + 1)


def batch(seed: int = 0) -> Batch:
    """Six images: with and without class, guidance above and below 1, one with t = s."""
    draw = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64, generator=draw)
    t, s, s2 = torch.rand(3, 6, dtype=torch.float64, generator=draw)
    t, s = torch.maximum(t, s), torch.minimum(t, s)
    s[2] = t[2]
    labels = torch.tensor([0, NONE, 3, 1, NONE, 4])
    w = torch.tensor([2.0, 1.0, 1.5, 0.75, 1.0, 3.0], dtype=torch.float64)
    return Batch(x0, x1, labels, w, t, s, s2, torch.full_like(labels, NONE))


def by_formulas(kind: str, network: DiT, target: DiT, given: Batch, scaled: bool) -> list[Tensor]:
    """Loss, velocity and flow terms of every image, and the gradients of the mean loss."""
    return differentiated(dense_terms(kind, network, target, given, scaled), network)


def by_loss(kind: str, network: DiT, target: DiT, given: Batch, scaled: bool) -> list[Tensor]:
    guidance = network.config.guidance
    found = FUNCTIONS[kind](network, target, given, scaled=scaled, guidance=guidance)
    assert all(term.shape == (len(given.x0),) for term in found)
    return differentiated(found, network)


def differentiated(found: Terms, network: DiT) -> list[Tensor]:
    learned = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found.loss.mean(), learned, materialize_grads=True)
    return [*(term.detach() for term in found), *gradients]


def single(network: DiT, given: Batch) -> tuple[DiT, Batch]:
    """Converts network and batch to float32."""
    fields = (z if z.dtype == torch.int64 else z.float() for z in given)
    return copy.deepcopy(network).float(), Batch(*fields)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_terms_and_gradients_are_those_of_the_formulas(kind: str, scaled: bool) -> None:
    network, target = networks()
    given = batch()
    exact = by_formulas(kind, network, target, given, scaled)
    network32, given32 = single(network, given)
    measured = by_formulas(kind, network32, copy.deepcopy(target).float(), given32, scaled)
    results = by_loss(kind, network, target, given, scaled)
    assert relative_error(results, exact) <= network_budget(measured, exact, torch.float32, torch.float64)
    results = by_loss(kind, network32, target.float(), given32, scaled)
    assert relative_error(results, exact) <= network_budget(measured, exact, torch.float32, torch.float32)


@pytest.mark.parametrize("changes", [{"guidance": False}, {"num_classes": 0}])
def test_networks_without_guidance_input_or_classes(changes: dict[str, Any]) -> None:
    network, target = networks(**changes)
    given = batch()
    if network.config.num_classes == 0:
        zeros = torch.zeros_like(given.labels)
        given = given._replace(labels=zeros, no_class=zeros, w=torch.ones_like(given.w))
    exact = by_formulas("tvm", network, target, given, True)
    network32, given32 = single(network, given)
    measured = by_formulas("tvm", network32, copy.deepcopy(target).float(), given32, True)
    results = by_loss("tvm", network, target, given, True)
    assert relative_error(results, exact) <= network_budget(measured, exact, torch.float32, torch.float64)


@pytest.mark.parametrize("scaled", [True, False])
def test_with_t_equal_to_s_tvm_is_flow_matching(scaled: bool) -> None:
    network, target = networks()
    given = batch()
    given = given._replace(t=given.s)
    tvm, flow = by_loss("tvm", network, target, given, scaled), by_loss("flow", network, target, given, scaled)
    assert all(map(torch.equal, tvm, flow))
    assert not tvm[1].any() and bool((tvm[2] > 0).all())


def test_without_guidance_flow_matching_is_the_mean_square_to_the_velocity() -> None:
    network, target = networks()
    given = batch()
    given = given._replace(w=torch.ones_like(given.w))
    x = given.x0 + given.s2[:, None, None, None] * (given.x1 - given.x0)
    u = network(x, given.s2, given.s2, given.labels, torch.ones_like(given.w))
    exact = differentiated(Terms(*[((u - (given.x1 - given.x0)) ** 2).mean((1, 2, 3))] * 3), network)
    results = by_loss("flow", network, target, given, True)
    measured = by_formulas("flow", *(n for n in map(lambda z: copy.deepcopy(z).float(), (network, target))),
                           single(network, given)[1], True)  # fmt: skip
    budget = network_budget(measured[2:], [exact[2], *exact[3:]], torch.float32, torch.float64)
    assert relative_error(results[2:], [exact[2], *exact[3:]]) <= budget


def test_the_derivative_of_the_displacement_agrees_with_central_differences() -> None:
    """df/ds, which the objective holds against u*: by a target that is zero, its square is the velocity term."""
    network, _ = networks()
    given = batch()
    keep = torch.tensor([0, 1, 3, 4, 5])  # t != s
    t, s = 0.6 + 0.3 * given.t, 0.3 * given.s
    s = (s / tolerance.STEP_GRID).round() * tolerance.STEP_GRID  # steps are exact
    given = Batch(*(z[keep] for z in given._replace(t=t, s=s)))
    x = given.x0 + given.t[:, None, None, None] * (given.x1 - given.x0)
    w = given.w[:, None, None, None]

    def f(s: Tensor) -> Tensor:
        return (s - given.t)[:, None, None, None] * w * network(x, given.t, s, given.labels, 1 / given.w)

    found: list[Tensor] = []

    def recording(*arguments: Any) -> Tensor:
        found.append(arguments[0])
        return torch.zeros_like(arguments[0])

    terms = loss.tvm_loss(network, recording, given, scaled=True, detach=False)  # type: ignore[arg-type]
    with torch.no_grad():
        quotients = [(f(given.s + h) - f(given.s - h)) / (2 * h) for h in (tolerance.STEP, 2 * tolerance.STEP)]
        value = f(given.s)
        F, dF_ds = network(x, given.t, given.s, given.labels, 1 / given.w, (None, None, torch.ones_like(given.s)))
        derivative = w * (F + (given.s - given.t)[:, None, None, None] * dF_ds)
        network32, given32 = single(network, given)
        beta32, along = 1 / given32.w, (None, None, torch.ones_like(given32.s))
        measured = network32(x.float(), given32.t, given32.s, given32.labels, beta32, along)
    relative = network_budget(measured, [F, dF_ds], torch.float32, torch.float64)
    bound = relative * value.norm().item(), relative * derivative.norm().item()
    verdict = tolerance.finite_difference("df/ds", derivative, (quotients[0], quotients[1]), *bound)
    assert verdict.ok, verdict
    squares = derivative.square().mean((1, 2, 3)) / given.w**2
    budget = network_budget([squares.float()], [squares], torch.float32, torch.float64)
    assert relative_error([terms.velocity], [squares]) <= budget
    assert relative_error([found[0][: len(x)]], [x + value]) <= budget  # the target sees the end of the jump


def test_no_gradient_reaches_the_target_or_passes_through_it() -> None:
    network, target = networks()
    for kind in loss.OBJECTIVES:
        config = LossConfig(objective=kind)  # type: ignore[arg-type]
        loss.terms(network, target, batch(), config).loss.sum().backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LossConfig(), "tvm"),
        (LossConfig(detach=True), "detached"),
        (LossConfig(objective="flow"), "flow"),
        (LossConfig(objective="meanflow"), "meanflow"),
        (LossConfig(objective="meanflow", adaptive_power=1.0), "adaptive"),
        (LossConfig(objective="imf"), "imf"),
        (LossConfig(objective="scm"), "scm"),
        (LossConfig(objective="shortcut"), "shortcut"),
        (LossConfig(scaled=False), "tvm"),
    ],
)
def test_the_configured_objective_is_evaluated(config: LossConfig, kind: str) -> None:
    network, target = networks()
    expected = by_loss(kind, network, target, batch(), config.scaled)
    assert all(map(torch.equal, differentiated(loss.terms(network, target, batch(), config), network), expected))


def test_numbers_that_are_not_finite_stay_visible() -> None:
    network, target = networks()
    given = batch()
    given.x0[1, 0, 0, 0] = math.nan
    with torch.no_grad():
        for kind in loss.OBJECTIVES:
            found = loss.terms(network, target, given, LossConfig(objective=kind)).loss  # type: ignore[arg-type]
            assert found.isnan().tolist() == [False, True, False, False, False, False]


def drawn(count: int = 20_000, seed: int = 0, num_classes: int = 4, **fields: Any) -> Batch:
    labels = torch.arange(count) % num_classes if num_classes else torch.zeros(count, dtype=torch.int64)
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.zeros(count, 1, 1, 1)
    return make_batch(x0, labels, LossConfig(**fields), TimeConfig(), num_classes, draw)


def test_a_dropped_label_becomes_no_class_with_guidance_one() -> None:
    given = drawn(w=2.5, label_dropout=0.3)
    dropped = given.labels == 4
    kept = ~dropped
    assert torch.equal(given.labels[kept], (torch.arange(20_000) % 4)[kept])
    assert bool((given.w[dropped] == 1).all()) and bool((given.w[kept] == 2.5).all())
    assert bool((given.no_class == 4).all())
    place = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniform = torch.where(dropped, 0.3 * place, 0.3 + 0.7 * place)  # if the share is 0.3
    assert kstest(uniform.numpy(), "uniform").pvalue > SIGNIFICANCE
    assert not (drawn(label_dropout=0.0).labels == 4).any() and bool((drawn(label_dropout=1.0).labels == 4).all())


@pytest.mark.parametrize(("kind", "power"), [("beta", -1), ("w", 1), ("balanced", 3)])
def test_random_guidance_is_uniform_in_itself_its_inverse_or_its_cube(kind: str, power: int) -> None:
    given = drawn(w_random=(1.25, 4.0), w_uniform=kind, label_dropout=0.0).w.double()
    low, high = sorted([1.25**power, 4.0**power])
    uniform = (given**power - low) / (high - low)
    assert kstest(uniform.clamp(0, 1).numpy(), "uniform").pvalue > SIGNIFICANCE
    assert 1.25 <= given.min() < given.max() <= 4


def test_noise_is_normal_and_the_batch_a_function_of_the_seed() -> None:
    given = drawn()
    assert kstest(given.x1.flatten().double().numpy(), "norm").pvalue > SIGNIFICANCE
    assert all(map(torch.equal, given, drawn()))
    assert not torch.equal(given.x1, drawn(seed=1).x1)
    assert all(z.dtype == torch.float32 for z in (given.x1, given.w, given.t, given.s, given.s2))


def test_images_that_come_without_class_have_no_guidance() -> None:
    unconditional = drawn(num_classes=0, w=3.0, label_dropout=0.0)
    assert bool((unconditional.w == 1).all()) and not unconditional.labels.any()
    labels = torch.tensor([4, 0])
    given = make_batch(
        torch.zeros(2, 1, 1, 1), labels, LossConfig(label_dropout=0.0), TimeConfig(), 4, torch.Generator()
    )
    assert given.w.tolist() == [1.0, 2.0]
    assert labels.tolist() == [4, 0]


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.zeros(2, 1)],
)
def test_labels_that_are_none_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^labels: expected .*, got "):
        make_batch(torch.zeros(2, 1, 1, 1), labels, LossConfig(), TimeConfig(), 4, torch.Generator())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"objective": "progressive"}, "objective"),
        ({"adaptive_power": 1.0}, "adaptive_power"),
        ({"objective": "meanflow", "adaptive_power": -1.0}, "adaptive_power"),
        ({"w": 0.0}, "w"),
        ({"w_random": (2.0, 1.0)}, "w_random"),
        ({"w_random": (0.0, 1.0)}, "w_random"),
        ({"w_uniform": "1/w"}, "w_uniform"),
        ({"label_dropout": -0.1}, "label_dropout"),
    ],
)
def test_a_configuration_that_is_none_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        LossConfig(**fields)
