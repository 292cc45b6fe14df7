"""Compares the derivatives of a model with central differences of it: its JVP, and the gradients through that."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import differences
from .differences import Quotient
from .findings import Comparison
from .subject import Pair, Subject

JVP, GRADIENT, GRADIENT_OF_JVP = "JVP", "gradient of the output", "gradient of the JVP"
_DIRECTIONS = 3


def comparisons(subject: Subject, detached: bool) -> tuple[Comparison, ...]:
    """Of a subject in float64. The parameters are moved, and put back."""
    found = subject.jvp()
    forward = differences.central(lambda step: subject.output(step).detach())
    judged = [differences.compare(JVP, found.tangent.detach(), forward)]
    parameters = subject.parameters
    if not parameters:
        return tuple(judged)
    generator = torch.Generator().manual_seed(subject.seed)
    weights = _weights(found, generator)[: 1 if detached else 2]
    gradients = [_gradient(loss, parameters) for loss in _losses(found, weights)]
    slopes, quotients = [], []
    for _ in range(_DIRECTIONS):
        along = [_direction(parameter, generator) for parameter in parameters]
        slopes.append(torch.stack([_inner(gradient, along) for gradient in gradients]))
        quotients.append(differences.central(functools.partial(_moved, subject, along, weights)))
    for i, what in enumerate((GRADIENT, GRADIENT_OF_JVP)[: len(weights)]):
        judged.append(differences.compare(what, torch.stack(slopes)[:, i], _of_loss(quotients, i)))
    return tuple(judged)


def backward(found: Pair, parameters: Sequence[nn.Parameter], detached: bool) -> None:
    """One backward pass through the output and, unless it is detached, its tangent."""
    loss = found.value.square().sum() if detached else found.value.square().sum() + found.tangent.square().sum()
    if parameters:
        torch.autograd.grad(loss, parameters, allow_unused=True)


def _weights(found: Pair, generator: torch.Generator) -> list[Tensor]:
    """Random weights that make a number about as large as 1 of the output, and of its tangent."""
    size = found.value.shape
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64).to(found.value.device) for _ in found)
    return [weight / (x.detach().norm() or 1.0) for weight, x in zip(drawn, found, strict=True)]


def _losses(found: Pair, weights: Sequence[Tensor]) -> list[Tensor]:
    return [(weight * x).sum() for weight, x in zip(weights, found, strict=False)]


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    if not loss.requires_grad:  # nothing that is trained leads there
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))


def _direction(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    """As large as the parameter is, so that all are moved by the same part of themselves."""
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
    return drawn * parameter.detach().abs().square().mean().sqrt() if parameter.numel() else drawn


def _inner(gradient: Sequence[Tensor | None], along: Sequence[Tensor]) -> Tensor:
    return torch.stack([(g * a).sum().real.cpu() if g is not None else torch.zeros((), dtype=torch.float64)
                        for g, a in zip(gradient, along, strict=True)]).sum()  # fmt: skip


def _moved(subject: Subject, along: Sequence[Tensor], weights: Sequence[Tensor], step: float) -> Tensor:
    """The losses with the parameters moved."""
    parameters = subject.parameters
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, along, strict=True):
            parameter.add_(direction, alpha=step)
    try:
        return torch.stack(_losses(subject.jvp(), weights)).detach().cpu()
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _of_loss(quotients: Sequence[Quotient], i: int) -> Quotient:
    """Of one of the losses, along all directions."""
    values, uncertainties, sizes = zip(*quotients, strict=True)
    return Quotient(torch.stack(values)[:, i], torch.stack(uncertainties)[:, i], max(sizes))
