"""What a run is after a number of steps: three networks, the optimizer, and that number."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ..model import ema
from ..model.dit import DiT
from . import parallel
from .checkpoint import Tensors, named
from .config import OptimConfig, TrainConfig
from .parallel import World
from .step import Objective


class State:
    """Everything that a checkpoint holds, and the loss as a module that works on it."""

    def __init__(self, config: TrainConfig, world: World, network: DiT | None = None) -> None:
        """The state before the first step; every process has the same.

        network: what training starts from, by default `initialised`; it is on the device of this process and becomes
            part of the state.
        """
        run = config.run
        self.network = initialised(config, world) if network is None else network
        parallel.same_start(self.network, world)
        self.target, self.average = ema.copy_of(self.network), ema.copy_of(self.network)
        objective = Objective(self.network, config, world.device)
        parallel.recompute(self.network.blocks, run.checkpointing)
        if run.compile:
            parallel.compile_blocks(self.network.blocks)
            parallel.compile_blocks(self.target.blocks)
        if run.parallel == "fsdp" and world.size > 1:
            parallel.shard(self.network.blocks, objective, world)
            for copy in (self.target, self.average):
                parallel.shard(copy.blocks, copy, world)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = _adamw(self.parameters, config.optim)
        self.averages = [
            ema.Average(self.target, self.network, config.optim.target_ema),
            ema.Average(self.average, self.network, config.optim.ema),
        ]
        self.objective = objective if run.parallel == "fsdp" else parallel.replicate(objective, world)
        self.step = 0
        self._optim = config.optim

    def advance(self) -> float:
        """One step along the gradient that the parameters hold; returns the learning rate."""
        optim = self._optim
        rate = optim.lr * min(1.0, (self.step + 1) / max(1, optim.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for average in self.averages:
            average.update()
        self.step += 1
        return rate

    def tensors(self) -> Tensors:
        """Every tensor of the state by name, not copies. Before the first step it must be used for loading only: it
        makes the optimizer's tensors by a step without gradient, which the optimizer counts."""
        tensors = named("network", self.network) | named("target", self.target) | named("ema", self.average)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.network, self.optimizer, options=options)
        return tensors | {f"optimizer.{name}": x for name, x in optimizer.items() if name.startswith("state.")}


def initialised(config: TrainConfig, world: World) -> DiT:
    """The network before the first step, a function of config.run.seed, on the device of this process."""
    torch.manual_seed(config.run.seed)
    with world.device:
        return DiT(config.model)


def _adamw(parameters: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )
