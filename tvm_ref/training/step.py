"""The gradient of one training step, accumulated over micro-batches and averaged over processes."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..model.dit import DiT
from ..objective.loss import Batch, Terms, flow_term, terms, tvm_velocity_term
from ..objective.parts import Goal
from .config import TrainConfig
from .parallel import World

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
FLOAT16_SCALE = 2.0**10  # of the loss in a backward pass in float16, whose least number is 6e-8


class Objective(nn.Module):
    """The loss of a batch as the forward pass of a module. This is the module that DDP and FSDP wrap.

    loss_scale: the factor of the loss in the backward pass, by which gradients are divided afterwards.
    in_two: whether the loss has two terms that can be computed one after the other.
    """

    def __init__(self, network: DiT, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self._loss, self._guidance, self._kind = config.loss, config.model.guidance, device.type
        self._precision = AUTOCAST.get(config.run.precision)
        self.loss_scale = FLOAT16_SCALE if self._precision == torch.float16 else 1.0
        self.in_two = config.loss.objective == "tvm"

    def forward(
        self, batch: Batch, target: DiT, first: bool = False, goal: Goal | None = None
    ) -> Terms | tuple[Tensor, Goal] | Tensor:
        """Returns the terms of the loss, each [B] float32. The target is an argument, so it is not a submodule.

        first: of two terms only the first, and the goal of the second.
        goal: of two terms only the second.
        """
        how: dict[str, Any] = {"scaled": self._loss.scaled, "guidance": self._guidance}
        of_first = {"detach": self._loss.detach, "guided": self._loss.guides}
        # No cache of weight casts: activation checkpointing needs the recomputation to run the same operators.
        dtype = self._precision or torch.bfloat16
        with torch.autocast(self._kind, dtype, enabled=self._precision is not None, cache_enabled=False):
            if first:
                return tvm_velocity_term(self.network, target, batch, **how, **of_first)
            if goal is not None:
                return flow_term(self.network, batch, goal, **how)
            return terms(self.network, target, batch, self._loss, guidance=self._guidance)


class Outcome(NamedTuple):
    """Results of a step, equal on every process.

    Loss terms are means over the global batch; gradient_norm is before clipping; stop: any process was asked to stop.
    """

    loss: float
    velocity: float
    flow: float
    gradient_norm: float
    stop: bool


class Observer(Protocol):
    """Looks on while a step is computed."""

    def losses(self, batch: Batch, terms: Terms) -> None:
        """After the backward pass of a micro-batch. terms: detached."""

    def gradients(self) -> None:
        """When the gradient of the step is in the parameters, before clipping."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite."""


class Queued:
    """A step whose work is queued on the device, and whose results are on their way to the host.

    finite: bool [], on the device: whether losses and gradient are, on every process.
    """

    def __init__(self, figures: Tensor, batches: Sequence[Batch], results: Sequence[Terms], world: World) -> None:
        """figures: loss, its two terms, processes asked to stop (a share), and gradient norm."""
        self.finite = figures.isfinite().all()
        self._batches, self._results, self._world = batches, results, world
        self._arrived: torch.cuda.Event | None = None
        self._figures = figures
        if figures.device.type == "cuda":
            self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def outcome(self) -> Outcome:
        """Waits for the results, but not for what was queued after them.

        Raises NonFiniteError on every process, naming loss term, images and times.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, velocity, flow, asked, size = self._figures.tolist()
        outcome = Outcome(loss, velocity, flow, size, asked > 0)
        if not all(map(math.isfinite, outcome)):
            raise NonFiniteError(_blame(self._batches, self._results, outcome, self._world))
        return outcome


def gradient(objective: nn.Module, target: DiT, batches: Sequence[Batch], world: World, **options: Any) -> Outcome:
    """`queue_gradient`, waited for. Raises NonFiniteError on every process, naming loss term, images and times."""
    return queue_gradient(objective, target, batches, world, **options).outcome()


def queue_gradient(
    objective: nn.Module,
    target: DiT,
    batches: Sequence[Batch],
    world: World,
    *,
    clip: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    observer: Observer | None = None,
    captured: Callable[[Batch], Terms] | None = None,
) -> Queued:
    """Computes the gradient of the mean loss over the global batch, and leaves it in the parameters of `objective`.

    objective: an `Objective`; for several processes, wrapped so that gradients are averaged (DDP or FSDP).
    batches: the micro-batches of this process, of equal size, on its device.
    clip: the largest gradient norm; None means no limit.
    stop: tells whether this process was asked to stop. It is called when the work of the step has been queued.
    observer: is told of the terms of each micro-batch, and when the gradient is there.
    captured: does the forward and backward pass of the one micro-batch (captured.py), as `passes` would.

    Does not wait for the device.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    results = []
    for i, batch in enumerate(batches):
        with _average_later(objective) if i < len(batches) - 1 else contextlib.nullcontext():
            results.append(captured(batch) if captured else passes(objective, target, batch, len(batches)))
        if observer is not None:
            observer.losses(batch, results[-1])
    if (scale := _own(objective).loss_scale) != 1:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / scale)
    if observer is not None:
        observer.gradients()
    means = [torch.stack(term).mean() for term in zip(*results, strict=True)]
    mean = world.sum(torch.stack([*means, means[0].new_tensor(float(stop()))])) / world.size
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip is not None:
        clip_grads_with_norm_(parameters, clip, norm)
    return Queued(torch.cat([mean, norm.reshape(1)]), batches, results, world)


def passes(objective: nn.Module, target: DiT, batch: Batch, count: int = 1) -> Terms:
    """Adds the gradient of the mean loss of a micro-batch, one of `count`, to the parameters; returns its terms.

    It is multiplied by the scale of the loss. Of two terms, the first has its backward pass before the second has its
    forward pass, so that memory holds what one of them keeps.
    """
    own = _own(objective)
    scale = own.loss_scale / count
    if not own.in_two:
        result = objective(batch, target)
        (result.loss.mean() * scale).backward()
        return Terms(*(term.detach() for term in result))
    with _average_later(objective):
        velocity, goal = objective(batch, target, first=True)
        (velocity.mean() * scale).backward()
    flow = objective(batch, target, goal=goal)
    (flow.mean() * scale).backward()
    velocity, flow = velocity.detach(), flow.detach()
    return Terms(velocity + flow, velocity, flow)


def _own(objective: nn.Module) -> Objective:
    own = objective.module if isinstance(objective, DistributedDataParallel) else objective
    assert isinstance(own, Objective)
    return own


def _average_later(objective: nn.Module) -> contextlib.AbstractContextManager:
    """Skips DDP's averaging for all but the last micro-batch. FSDP averages each time, which saves memory."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else contextlib.nullcontext()


def _blame(batches: Sequence[Batch], results: Sequence[Terms], outcome: Outcome, world: World) -> str:
    """Describes which loss terms are not finite, and for which images and times."""
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    found = Terms(*(torch.cat(parts) for parts in zip(*results, strict=True)))
    lines = []
    for name, values in (("terminal-velocity", found.velocity), ("flow-matching", found.flow)):
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            i = bad[0]
            t, s, s2, w = (times[i].item() for times in (batch.t, batch.s, batch.s2, batch.w))
            lines.append(
                f"the {name} term is {values[i].item()} for {len(bad)} of the {len(values)} images of process "
                f"{world.rank}, first at t = {t:.9g}, s = {s:.9g}, s' = {s2:.9g}, w = {w:.9g}, label "
                f"{batch.labels[i].item()}"
            )
    everywhere = [line for part in world.gather(lines) for line in part]
    return "; ".join(everywhere) or f"both loss terms are finite, the gradient is not: {outcome}"
