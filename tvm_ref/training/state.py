"""The training state that a checkpoint holds: the network, its averages, the optimizer and the step number."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from flashjvp.environment import has_triton

from ..model import ema
from ..model.dit import DiT
from ..model.power_ema import PowerAverage
from . import parallel
from .captured import CapturedGradient
from .checkpoint import Tensors, named
from .config import ConfigError, OptimConfig, TrainConfig
from .parallel import World
from .precompile import precompile_attention
from .schedule import learning_rate
from .step import Objective, passes

if TYPE_CHECKING:
    from .update import FusedUpdate


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
        if run.cuda_graph and (world.device.type != "cuda" or world.size > 1):
            expected = "False but for one process with a GPU"
            raise ConfigError(f"run.cuda_graph: expected {expected}, got True on {world.device}, {world.size} of them")
        if run.precision == "tf32" and world.device.type != "cuda":
            raise ConfigError(f"run.precision: expected another one than tf32 on {world.device}, which has no TF32")
        # For the whole process, as PyTorch has it: what an earlier run in it has set does not count.
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
        compiling = precompile_attention(config, world.device) if run.compile else None
        self.network = initialised(config, world) if network is None else network
        parallel.same_start(self.network, world)
        self.target, self.average = ema.copy_of(self.network), ema.copy_of(self.network)
        widths = config.ema.sigma_rels or ()
        self.post_hoc = {width: ema.copy_of(self.network) for width in widths}
        parallel.share_tokens((self.network, self.target), run.context_parallel, world)
        if run.precision == "float8":
            _multiply_in_float8((self.network, self.target), world.device)
        if run.residual == "bfloat16":
            for copy in (self.network, self.target):
                copy.keep_residual_in(torch.bfloat16)
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
        if run.cuda_graph and compiling is not None:
            compiling.join()  # no graph can be captured while another thread allocates memory
        passes_of_batch = partial(passes, self.objective, self.target)
        self.captured = CapturedGradient(passes_of_batch, self.parameters) if run.cuda_graph else None
        self.step = 0
        self._optim, self._steps = config.optim, run.steps
        self._may_fuse = fuses(self)
        self._fused: FusedUpdate | None = None  # once the optimizer has its moments

    def advance(self, finite: Tensor | None = None) -> float:
        """Makes an optimizer step with the gradients in the parameters, updates the EMAs; returns the learning rate.

        finite: bool [], on the device: False leaves every tensor as it is, and only counts the step. The device is not
            waited for where one kernel updates all: on a GPU with Triton, after the first step, without post-hoc EMA.
        """
        rate = learning_rate(self._optim, self.step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        gradients = [ema.local(p.grad) for p in self.parameters if p.grad is not None]
        whole = len(gradients) == len(self.parameters) and all(x.is_contiguous() for x in gradients)
        if self._may_fuse and whole and len(self.optimizer.state) == len(self.parameters):
            self._advance_fused(gradients, rate, finite)
        elif finite is None or bool(finite):
            self.optimizer.step()
            for average in self.averages:
                average.update()
            for power_average in self._power_averages:
                power_average.update(self.step)
        return rate

    def take_back(self) -> None:
        """After `advance` by a gradient that was not finite: the step does not count."""
        self.step -= 1

    def _one_kernel(self) -> "FusedUpdate":
        from .update import FusedUpdate

        learned = [i for i, p in enumerate(self.network.parameters()) if p.requires_grad]
        copies = [list(module.parameters()) for module in (self.target, self.average)]
        moments = [[self.optimizer.state[p][name] for p in self.parameters] for name in ("exp_avg", "exp_avg_sq")]
        lists = [self.parameters, *moments, *([of[i] for i in learned] for of in copies)]
        return FusedUpdate(*([ema.local(x) for x in of] for of in lists))

    def _advance_fused(self, gradients: list[Tensor], rate: float, finite: Tensor | None) -> None:
        from .update import Rates

        fused = self._fused = self._fused or self._one_kernel()
        optim = self._optim
        if finite is None:
            finite = torch.ones((), dtype=torch.bool, device=fused.device)
        counts = [self.optimizer.state[p]["step"] for p in self.parameters]
        torch._foreach_add_(counts, finite.to(counts[0]))
        fused(
            gradients,
            Rates(
                rate, *optim.betas, optim.eps, optim.weight_decay, self.step,
                target_rate=optim.target_ema, average_rate=optim.ema,
            ),
            finite,
        )  # fmt: skip

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


def fuses(state: State) -> bool:
    """Whether the kernel of update.py may update all: contiguous float32 on a GPU, without post-hoc EMA."""
    modules = (state.network, state.target, state.average)
    weights = [ema.local(p) for module in modules for p in module.parameters()]
    fit = all(x.device.type == "cuda" and x.dtype == torch.float32 and x.is_contiguous() for x in weights)
    return fit and has_triton() and not state.post_hoc


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


def _multiply_in_float8(networks: Sequence[DiT], device: torch.device) -> None:
    """Raises ConfigError without torchao, and for widths whose rows are no multiple of 16 bytes."""
    from ..model.float8 import linear_on  # needs an extra

    widths = networks[0].config.width, networks[0].config.hidden
    if any(width % 16 != 0 for width in widths):
        expected = "another one than float8 where 16 does not divide the widths of the network"
        raise ConfigError(f"run.precision: expected {expected}, {widths}")
    try:
        product = linear_on(device)
    except ImportError as error:
        expected = "another one than float8 without torchao: pip install 'flashjvp[float8]'"
        raise ConfigError(f"run.precision: expected {expected} ({error})") from error
    for network in networks:
        network.multiply_with(product)
