"""Small runs for the tests of the trainer, in this process or in children.

Children are forked from a server that has the modules loaded, so that one costs no start of Python.
"""

import dataclasses
import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tvm_ref.config import OptimConfig, RunConfig, TrainConfig
from tvm_ref.data import DataConfig
from tvm_ref.dit import DiTConfig
from tvm_ref.loss import LossConfig
from tvm_ref.parallel import world
from tvm_ref.trainer import Trainer

CHILDREN = multiprocessing.get_context("forkserver")
# What a run imports when it is first needed comes after its own module.
LATER = ["torch.utils.tensorboard", "torch._dynamo", "safetensors.torch", "flashjvp.tiled", "numpy.random"]
CHILDREN.set_forkserver_preload(["tests.tvm_ref.runs", *LATER])
PATIENCE_SECONDS = 120  # after which a child hangs


def toy(out: Path, **run: Any) -> TrainConfig:
    """Points without classes: the cheapest run."""
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
    """Digits with classes, guidance, clipping and warm-up: every part of a step."""
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
    """A child that runs work(*arguments), a function at the top of a module, with these environment variables."""
    child = CHILDREN.Process(target=_child, args=(environment, work, arguments))
    child.start()
    return child


def _child(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    work(*arguments)


def finish(*children: BaseProcess) -> None:
    """Waits for children, all of which must succeed."""
    for child in children:
        child.join(PATIENCE_SECONDS)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * len(codes)


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs work(*arguments) in `size` processes that gloo connects, like torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    ranks = [start(work, *arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]
    finish(*ranks)


def train_silently(config: TrainConfig) -> None:
    """`train` as the work of a child."""
    train(config)
