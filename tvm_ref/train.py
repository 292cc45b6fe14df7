"""Trains a network: `python -m tvm_ref.train [PRESET] [--field value ...]`.

The default preset is `digits`. On several GPUs: `torchrun --nproc-per-node 8 -m tvm_ref.train imagenet256-w2 ...`.
"""

import sys

import tyro
from rich.console import Console

from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.logger import MetricsError
from .training.parallel import leave, world
from .training.presets import PRESETS
from .training.step import NonFiniteError

DEFAULT = "digits"
DESCRIPTION = """Terminal Velocity Matching: trains a network that samples in one step.

Choose a preset (default: digits), then change any setting:

- python -m tvm_ref.train digits --run.steps 100 --run.out runs/short
- python -m tvm_ref.train digits --help lists every setting

A run found in --run.out is resumed where it stopped."""


def parse(arguments: list[str]) -> TrainConfig:
    """Parses command-line arguments into a configuration. Exits with a message if they are invalid."""
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = [DEFAULT, *arguments]
    presets = {name: ((make.__doc__ or "").strip(), make()) for name, make in PRESETS.items()}
    return tyro.extras.overridable_config_cli(
        presets, prog="python -m tvm_ref.train", description=DESCRIPTION, args=arguments
    )


def main() -> None:
    """Runs the command."""
    try:
        config = parse(sys.argv[1:])
        import torch  # slow to import, and not needed for --help

        from .training.trainer import Trainer

        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        with world(config.run.device) as this:
            Trainer(config, this, Console()).run()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was saved is complete") from None
    except (ValueError, OSError, CheckpointError, MetricsError, NonFiniteError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
    leave(0)
