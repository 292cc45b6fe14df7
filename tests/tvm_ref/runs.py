"""Small runs for the tests of the trainer, in this process or in children.

Child processes are forked from a server that has the modules loaded, so that they start quickly.
"""

import atexit
import dataclasses
import faulthandler
import functools
import io
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tvm_ref import train as command
from tvm_ref.data.dataset import DataConfig
from tvm_ref.model.dit import DiTConfig
from tvm_ref.objective.loss import LossConfig
from tvm_ref.training.config import OptimConfig, RunConfig, TrainConfig
from tvm_ref.training.parallel import world
from tvm_ref.training.trainer import Trainer

# What only asks whether there is a GPU makes it useless to processes that are forked from then on.
CHILDREN = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
# Modules that a run imports lazily; they must be preloaded after this one.
LATER = ["torch.utils.tensorboard", "torch._dynamo", "flashjvp.backends.tiled", "numpy.random", "tvm_ref.evaluate"]
CHILDREN.set_forkserver_preload(["tests.tvm_ref.runs", *LATER])
PATIENCE_SECONDS = 120  # a child that takes longer is considered hung
LAST_WORDS_SECONDS = 10  # this long before that limit, a child prints the stacks of its threads


def toy(out: Path, **run: Any) -> TrainConfig:
    """A run on points without classes, the cheapest one."""
    defaults: dict[str, Any] = {
        "steps": 8,
        "batch": 24,
        "save_every": 2,
        "sample_every": 100,
        "evaluate": False,
        "device": "cpu",
    }
    return TrainConfig(
        model=DiTConfig(image_size=1, channels=2, patch=1, width=8, depth=1, heads=1, guidance=False),
        data=DataConfig(name="eight_gaussians"),
        loss=LossConfig(w=1.0),
        optim=OptimConfig(lr=1e-3, ema=0.9),
        run=RunConfig(out=str(out), **(defaults | run)),
    )


def digits(out: Path, **run: Any) -> TrainConfig:
    """A run on digits with classes, guidance, clipping and warm-up, so that a step has all its parts."""
    config = toy(out, **run)
    return dataclasses.replace(
        config,
        model=DiTConfig(
            image_size=8, channels=1, patch=4, width=8, depth=2, heads=2, num_classes=10, attention_backend="reference"
        ),
        data=DataConfig(name="digits"),
        loss=LossConfig(w=1.5),
        optim=OptimConfig(lr=1e-3, clip=1.0, warmup_steps=3),
    )


def command_line(out: Path, **run: Any) -> list[str]:
    """The arguments of `python -m tvm_ref.train` for a run as cheap as `toy`, without a final evaluation."""
    settings = {"batch": 24, "save_every": 2, "sample_every": 100, "device": "cpu", "out": out} | run
    words = [word for name, value in settings.items() for word in (f"--run.{name.replace('_', '-')}", str(value))]
    return ["toy2d", "--model.width", "8", "--model.depth", "1", "--run.no-evaluate", *words]


def change(config: TrainConfig, **run: Any) -> TrainConfig:
    """`config` with other run settings."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))


def train(config: TrainConfig) -> str:
    """Runs `config` in this process; returns what it printed."""
    printed = io.StringIO()
    with world(config.run.device) as this:
        Trainer(config, this, Console(file=printed, width=200)).run()
    return printed.getvalue()


def start(work: Callable[..., None], *arguments: Any, **environment: str) -> BaseProcess:
    """Starts a child that runs work(*arguments), a module-level function, with these environment variables."""
    patience = PATIENCE_SECONDS - LAST_WORDS_SECONDS
    child = CHILDREN.Process(target=_child, args=(_outputs(), patience, environment, work, arguments))
    child.start()
    return child


@functools.cache
def _outputs() -> Path:
    """The folder of the children's output, one file each, named by process id."""
    folder = tempfile.TemporaryDirectory(prefix="children-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _child(
    outputs: Path, patience: float, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    with (outputs / str(os.getpid())).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.dump_traceback_later(patience)
    os.environ |= environment
    torch.set_num_threads(1)
    work(*arguments)


def printed_by(child: BaseProcess) -> str:
    """What a child wrote to standard output and error, including the stacks of its threads if it hung."""
    file = _outputs() / str(child.pid)
    return file.read_text(errors="replace") if file.exists() else ""


def finish(*children: BaseProcess, code: int = 0) -> None:
    """Waits for children and asserts that all of them end with this exit code."""
    for child in children:
        child.join(PATIENCE_SECONDS)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [code] * len(codes), "\n".join(
        f"--- exit code {got} (None: it hung), printed:\n{printed_by(child)}"
        for got, child in zip(codes, children, strict=True)
    )


def launch(size: int, work: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Starts `size` children that run work(*arguments) as one process group, like torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [start(work, *arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs work(*arguments) in `size` children as one process group, and waits for them."""
    finish(*launch(size, work, *arguments))


def train_silently(config: TrainConfig) -> None:
    """`train` without a result, to be run in a child."""
    train(config)


def run_command(arguments: list[str]) -> None:
    """`python -m tvm_ref.train`, to be run in a child."""
    sys.argv = ["train", *arguments]
    command.main()
