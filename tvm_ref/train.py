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
from .training.run_lock import RunLockedError
from .training.step import NonFiniteError

DEFAULT = "digits"
STOPPED = 128  # plus the number of the signal is the exit status, as in a shell
DESCRIPTION = """Terminal Velocity Matching: trains a network that samples in one step.

Choose a preset (default: digits), then change any setting:

- python -m tvm_ref.train digits --run.steps 100 --run.out runs/short
- python -m tvm_ref.train digits --help lists every setting

A run found in --run.out is resumed where it stopped. Ctrl-C and SIGTERM save the run and
end it with exit status 130 or 143; a finished run exits with 0."""


def parse(arguments: list[str]) -> TrainConfig:
    """Parses command-line arguments into a configuration. Exits with a message if they are invalid."""
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = [DEFAULT, *arguments]
    presets = {name: ((make.__doc__ or "").strip(), make()) for name, make in PRESETS.items()}
    return tyro.extras.overridable_config_cli(
        presets, prog="python -m tvm_ref.train", description=DESCRIPTION, args=arguments
    )


def main() -> int:
    """Runs the command. Returns 0 for a finished run, 128 plus the signal's number for a stopped one (130: Ctrl-C)."""
    try:
        config = parse(sys.argv[1:])
        import torch  # slow to import, and not needed for --help

        from .training.trainer import Trainer

        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        with world(config.run.device) as this:
            trainer = Trainer(config, this, Console())
            return 0 if trainer.run() else STOPPED + trainer.signal
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was saved is complete") from None
    except (ValueError, OSError, CheckpointError, MetricsError, NonFiniteError, RunLockedError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    leave(main())
