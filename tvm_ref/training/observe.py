"""What is observed inside of a step beside its loss: norms of every block, and the loss by time.

Everything is computed on the device by operators of its own, outside of compiled blocks, and read when a row is due. So
an ordinary step waits for nothing, and observing changes no bit of the training.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..model.dit import DiT
from ..model.dual import Dual
from ..objective.loss import AT_T, Batch, Terms
from .config import TrainConfig
from .parallel import World

WRAPPED = "_checkpoint_wrapped_module."


class NormRow(NamedTuple):
    """Norms of one part of the network in one step, over the global batch.

    gradient_norm: of the gradient of all its weights, before clipping. The others are those of a block's output tokens,
    root mean squares over all forward passes with a gradient: of the tokens, and of their tangents. NaN: there is none.
    """

    step: int
    part: str
    gradient_norm: float
    activation_rms: float
    tangent_rms: float


class BinRow(NamedTuple):
    """Mean loss terms over the steps since the last such row, of images whose time is in [low, high).

    The time of the terminal-velocity term is t, that of the flow-matching term s'; for objectives but tvm and flow it
    is t for both. NaN: no image.
    """

    step: int
    low: float
    high: float
    velocity: float
    velocity_images: int
    flow: float
    flow_images: int


class Observations:
    """Observes the steps of one process, and sums over all processes when a row is due."""

    def __init__(self, config: TrainConfig, network: DiT, world: World) -> None:
        """network: after it was sharded, if it is."""
        self._run, self._world, self._network = config.run, world, network
        self._flow_at_t = config.loss.objective in AT_T
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                found = re.match(r"blocks\.\d+|\w+", name.replace(WRAPPED, ""))
                assert found is not None
                self._parts[found[0]].append(parameter)
        # Each process then has a shard of every gradient, else the whole one.
        self._sharded = any(isinstance(x, DTensor) for x in network.parameters())
        self._squares = torch.zeros(0)  # [blocks, (sum, count) of tokens and tangents], float64
        self._gradients = torch.zeros(0)  # [parts], float64: squares of the norms on this process
        # [bins, (sum, count) of the velocity and the flow term], float64: since the last row, and of this step
        self._bins = torch.zeros(config.run.loss_bins, 4, dtype=torch.float64, device=world.device)
        self._bins_of_step = self._bins.clone()

    def begin(self, step: int) -> None:
        """Before step `step`, counted from 1."""
        self._bins_of_step.zero_()
        self._norms_due = bool(self._run.log_norms) and step % self._run.log_norms == 0
        self._bins_due = bool(self._run.loss_bins) and step % self._run.log_every == 0
        self._network.watch = self._tokens if self._norms_due else None
        if self._norms_due:
            depth = len(self._network.blocks)
            self._squares = torch.zeros(depth, 4, dtype=torch.float64, device=self._world.device)

    @torch.no_grad()
    def losses(self, batch: Batch, terms: Terms) -> None:
        """After the forward pass of a micro-batch."""
        if not self._run.loss_bins:
            return
        flow_time = batch.t if self._flow_at_t else batch.s2
        for column, (time, values) in enumerate(((batch.t, terms.velocity), (flow_time, terms.flow))):
            count = self._run.loss_bins
            places = (time.double() * count).long().clamp(0, count - 1)
            # A product with ones and zeros: sums in the same order every time, unlike sums by index on a GPU.
            chosen = torch.nn.functional.one_hot(places, count).double()
            both = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)])
            self._bins_of_step[:, 2 * column : 2 * column + 2] += (both @ chosen).T

    @torch.no_grad()
    def gradients(self) -> None:
        """After the backward passes of a step, before clipping."""
        if not self._norms_due:
            return
        norms = []
        for parameters in self._parts.values():
            local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
            norms.append(get_total_norm([x for x in local if x is not None]).double().square())
        self._gradients = torch.stack(norms)

    def rows(self, step: int) -> tuple[list[NormRow], list[BinRow]]:
        """The rows that are due after step `step`. Every process calls it after every step that is not thrown away."""
        norms, bins = [], []
        self._bins += self._bins_of_step
        if self._norms_due:
            tokens = self._world.sum(self._squares).tolist()
            squares = (self._world.sum(self._gradients) if self._sharded else self._gradients).tolist()
            for name, square in zip(self._parts, squares, strict=True):
                value = tokens[int(name.split(".")[1])] if "." in name else [0.0] * 4
                norms.append(NormRow(step, name, square**0.5, _mean(*value[:2]) ** 0.5, _mean(*value[2:]) ** 0.5))
        if self._bins_due:
            sums = self._world.sum(self._bins.clone()).tolist()
            self._bins.zero_()
            for i, (velocity, velocities, flow, flows) in enumerate(sums):
                low, high = i / len(sums), (i + 1) / len(sums)
                means = (_mean(velocity, velocities), int(velocities), _mean(flow, flows), int(flows))
                bins.append(BinRow(step, low, high, *means))
        return norms, bins

    def unwritten(self) -> list[Any]:
        """What rows to come need of the steps so far, of every process: for a checkpoint. Every process calls it."""
        return self._world.gather(self._bins.tolist()) if self._run.loss_bins else []

    def resume(self, unwritten: Sequence[Any]) -> None:
        """Goes on from what `unwritten` gave, unless the number of bins is another one now."""
        parts = [torch.tensor(part, dtype=torch.float64) for part in unwritten]
        if any(part.shape != self._bins.shape for part in parts) or not parts:
            return
        if len(parts) == self._world.size:
            self._bins.copy_(parts[self._world.rank])
        elif self._world.first:
            self._bins.copy_(torch.stack(parts).sum(0))

    @torch.no_grad()
    def _tokens(self, block: int, tokens: Dual) -> None:
        for column, values in enumerate(tokens):
            if values is not None:
                square = values.detach().float().square().mean(dtype=torch.float64)
                self._squares[block, 2 * column : 2 * column + 2] += torch.stack([square, torch.ones_like(square)])


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
