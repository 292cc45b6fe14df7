"""Trains a network: `python -m tvm_ref.train [PRESET] [--field value ...]`.

The default preset is `digits`. On several GPUs: `torchrun --nproc-per-node 8 -m tvm_ref.train imagenet256-w2 ...`.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from flashjvp_commands import ending
from flashjvp_commands.entry import program

from .arguments import parsed_by
from .training.checkpoint import CheckpointError
from .training.config import ConfigError, TrainConfig
from .training.logger import MetricsError
from .training.parallel import leave, world
from .training.presets import PRESETS
from .training.run_lock import RunLockedError
from .training.step import NonFiniteError
from .training.yaml_config import with_yaml

DEFAULT = "digits"
PAIR = re.compile(r"[-+\d.einfa]+,[-+\d.einfa]+")  # 0.9,0.95: two numbers, which tyro wants as two words
DESCRIPTION = """Terminal Velocity Matching: trains a network that samples in one step.

Choose a preset (default: digits), then change any setting:

- python -m tvm_ref.train digits --run.steps 100 --run.out runs/short
- python -m tvm_ref.train digits --help lists every setting
- python -m tvm_ref.train digits --config settings.yaml takes settings from a file; options after it override them

A run found in --run.out is resumed where it stopped. Ctrl-C and SIGTERM save the run and end it with exit status 130 or
143; a finished run exits with 0."""


def parse(arguments: list[str]) -> TrainConfig:
    """Parses command-line arguments into a configuration. Exits with a message if they are invalid."""
    arguments, file = without_config(arguments)
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = [DEFAULT, *arguments]
    presets = {name: ((make.__doc__ or "").strip(), make()) for name, make in PRESETS.items()}
    if file is not None and arguments[0] in presets:
        about, config = presets[arguments[0]]
        presets[arguments[0]] = about, with_yaml(config, file)
    split = [part for word in arguments for part in (word.split(",") if PAIR.fullmatch(word) else [word])]
    prog = program("tvm_ref.train")
    return parsed_by(
        lambda words: tyro.extras.overridable_config_cli(presets, prog=prog, description=DESCRIPTION, args=words), split
    )


def without_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Takes `--config FILE.yaml` out of the arguments. Raises ConfigError for one without a file, or a second one."""
    rest, files = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if len(files) > 1 or "" in files:
        raise ConfigError("--config: expected one YAML file of settings")
    return rest, Path(files[0]) if files else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 for a finished run, 128 plus the signal's number for a stopped one (130: Ctrl-C)."""
    try:
        config = parse(list(sys.argv[1:] if arguments is None else arguments))
        import torch  # slow to import, and not needed for --help

        from .training.trainer import Trainer

        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        with world(config.run.device) as this:
            trainer = Trainer(config, this, Console())
            return 0 if trainer.run() else ending.STOPPED + trainer.signal
    except KeyboardInterrupt as stop:
        print("stopped at once: what was saved before is complete", file=sys.stderr)
        return ending.stopped_status(stop)
    except ConfigError as error:
        raise ending.unusable(error) from error
    except (ValueError, OSError, CheckpointError, MetricsError, NonFiniteError, RunLockedError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    leave(ending.run(main))
