"""The training state that a checkpoint holds: the network, its averages, the optimizer and the step number."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ..model import ema
from ..model.dit import DiT
from ..model.power_ema import PowerAverage
from . import parallel
from .checkpoint import Tensors, named
from .config import OptimConfig, TrainConfig
from .parallel import World
from .schedule import learning_rate
from .step import Objective


class State:
    """The network, target network, EMA weights, optimizer and step number, and the `Objective` to train with.

    post_hoc: the averages of config.ema.sigma_rels, by their relative width.
    """

    def __init__(self, config: TrainConfig, world: World, network: DiT | None = None) -> None:
        """Creates the state before the first step, equal on every process.

        network: the network to start from, by default `initialised`. It must be on the device of this process, and
            becomes part of the state.
        """
        run = config.run
        self.network = initialised(config, world) if network is None else network
        parallel.same_start(self.network, world)
        self.target, self.average = ema.copy_of(self.network), ema.copy_of(self.network)
        widths = config.ema.sigma_rels or ()
        self.post_hoc = {width: ema.copy_of(self.network) for width in widths}
        parallel.share_tokens((self.network, self.target), run.context_parallel, world)
        objective = Objective(self.network, config, world.device)
        parallel.recompute(self.network.blocks, run.checkpointing)
        if run.compile:
            parallel.compile_blocks(self.network.blocks)
            parallel.compile_blocks(self.target.blocks)
        if run.parallel == "fsdp" and world.size > 1:
            parallel.shard(self.network.blocks, objective, world)
            for copy in (self.target, self.average, *self.post_hoc.values()):
                parallel.shard(copy.blocks, copy, world)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = _adamw(self.parameters, config.optim)
        self.averages = [
            ema.Average(self.target, self.network, config.optim.target_ema),
            ema.Average(self.average, self.network, config.optim.ema),
        ]
        self._power_averages = [PowerAverage(copy, self.network, width) for width, copy in self.post_hoc.items()]
        self.objective = objective if run.parallel == "fsdp" else parallel.replicate(objective, world)
        self.step = 0
        self._optim, self._steps = config.optim, run.steps

    def advance(self) -> float:
        """Makes an optimizer step with the gradients in the parameters, updates the EMAs; returns the learning rate."""
        rate = learning_rate(self._optim, self.step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for average in self.averages:
            average.update()
        self.step += 1
        for power_average in self._power_averages:
            power_average.update(self.step)
        return rate

    def checkpoint_bytes(self) -> int:
        """The size of the tensors of a checkpoint: network, target, averages, and two moments of every parameter."""
        modules = (self.network, self.target, self.average, *self.post_hoc.values())
        stored = [x for module in modules for x in module.state_dict().values()] + 2 * self.parameters
        return sum(x.numel() * x.element_size() for x in stored)

    def tensors(self) -> Tensors:
        """Returns every tensor of the state by name, without copying.

        Before the first step, use the result only to load a checkpoint into: to create the optimizer's tensors,
        PyTorch makes a step without gradients, and the optimizer counts it.
        """
        tensors = named("network", self.network) | named("target", self.target) | named("ema", self.average)
        for number, copy in enumerate(self.post_hoc.values()):
            tensors |= named(f"post_hoc_{number}", copy)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.network, self.optimizer, options=options)
        return tensors | {f"optimizer.{name}": x for name, x in optimizer.items() if name.startswith("state.")}


def initialised(config: TrainConfig, world: World) -> DiT:
    """Creates the network with initial weights from config.run.seed, on the device of this process."""
    torch.manual_seed(config.run.seed)
    with world.device:
        return DiT(config.model)


def _adamw(parameters: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )
