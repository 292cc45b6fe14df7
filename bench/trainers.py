"""The trainers whose steps are measured: tvm_ref, and the published one, which is called from a checkout."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from reports.training_tables import PEER as OFFICIAL
from tvm_ref.model import ema
from tvm_ref.model.dit import DiT
from tvm_ref.objective.loss import Batch
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from tvm_ref.training.step import queue_gradient
from verify.model import peer

from .step_trace import OPTIMIZER

OURS = "tvm_ref"
DATA_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Found(NamedTuple):
    """The loss of a step, and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class Step(Protocol):
    """Makes training steps, each with optimizer and both averages. parameters: how many numbers the network has."""

    parameters: int

    def __call__(self, batches: list[Batch]) -> Found: ...


class TvmRefStep:
    """The step of `tvm_ref.train` with its settings."""

    def __init__(self, config: TrainConfig, start: DiT, this: World) -> None:
        """start: the network to begin with, which becomes part of the state."""
        self._this, self._clip = this, config.optim.clip
        self._state = State(config, this, start.to(this.device))
        self.parameters = _count(self._state.target)

    def __call__(self, batches: list[Batch]) -> Found:
        state = self._state
        queued = queue_gradient(
            state.objective, state.target, batches, self._this, clip=self._clip, captured=state.captured
        )
        with torch.profiler.record_function(OPTIMIZER):
            state.advance(queued.finite)
        outcome = queued.outcome()
        return Found(outcome.loss, outcome.gradient_norm)


class OfficialStep:
    """The published network and loss as they are, eager and with their attention kernel, in a step like theirs.

    Around them are PyTorch's AdamW and two averages. The gradient's norm is computed for the row, also where they do
    not clip gradients and so compute none.
    """

    def __init__(self, wrapper: Any, config: TrainConfig, start: DiT, this: World) -> None:
        """wrapper: the published module (`peer.imported`). start: the network whose weights are copied."""
        options = {"data_type": DATA_TYPES[config.run.precision], "detach_jvp": config.loss.detach}
        model, optim = config.model, config.optim
        self._module = peer.build(wrapper, model, config.loss.scaled, model.spectral_time_mlp, **options)
        self._module.model.load_state_dict(start.state_dict())
        self._module.to(this.device)
        self._target, self._average = ema.copy_of(self._module), ema.copy_of(self._module)
        self._averages = [
            ema.Average(self._target, self._module, optim.target_ema),
            ema.Average(self._average, self._module, optim.ema),
        ]
        self._learned = [p for p in self._module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._learned, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self._clip = config.optim.clip
        self.parameters = _count(self._module)

    def __call__(self, batches: list[Batch]) -> Found:
        (batch,) = batches
        loss = peer.terms(self._module, self._target, batch).loss.mean()
        loss.backward()
        gradients = [p.grad for p in self._learned if p.grad is not None]
        norm = get_total_norm(gradients) if self._clip is None else clip_grad_norm_(self._learned, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for average in self._averages:
            average.update()
        return Found(loss.item(), norm.item())


def official_path(text: str) -> Path:
    """The checkout that official=PATH names. Raises ArgumentTypeError."""
    name, _, path = text.partition("=")
    if name != OFFICIAL or not path:
        raise argparse.ArgumentTypeError(f"expected {OFFICIAL}=PATH, got {text!r}")
    return Path(path)


@contextlib.contextmanager
def official_module(checkout: Path | None) -> Iterator[Any]:
    """The published module, None without a checkout. Raises ConfigError for one that cannot be imported."""
    with contextlib.ExitStack() as stack:
        try:
            wrapper = None if checkout is None else stack.enter_context(peer.imported(checkout))
        except ModuleNotFoundError as error:
            raise ConfigError(f"--peer {OFFICIAL}={checkout}: {error}") from error
        yield wrapper


def official_settings(configs: Sequence[TrainConfig], this: World) -> list[TrainConfig]:
    """These settings without what the published trainer lacks (compilation, checkpointing and the like), each once.

    Raises ConfigError where it cannot train with them.
    """
    found: list[TrainConfig] = []
    for config in configs:
        run, objective = config.run, config.loss.objective
        for expected, got, holds in (
            ("one process", this.size, this.size == 1),
            ("a GPU", this.device.type, this.device.type == "cuda"),
            ("--accumulate 1", run.accumulate, run.accumulate == 1),
            ("--objective tvm", objective, objective == "tvm"),
            (f"--precision out of {', '.join(DATA_TYPES)}", run.precision, run.precision in DATA_TYPES),
        ):
            if not holds:
                raise ConfigError(f"--peer {OFFICIAL}: expected {expected}, got {got}")
        run = replace(run, residual="float32", compile=False, checkpointing="none", cuda_graph=False, parallel="ddp")
        if (theirs := replace(config, run=run)) not in found:
            found.append(theirs)
    return found


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
