"""The reference trainer for Terminal Velocity Matching, built on flashjvp.

Commands, run as `python -m tvm_ref.NAME`: train, sample, evaluate, encode (images to VAE latents), convert (published
weights), ema (averaged weights of any length), export (weights for others), experiments. Packages: data (data sets),
model (the network), objective (losses), training (the training loop and checkpoints), sampling (the sampler), quality
(FID and other metrics) and experiments. The module unfinished keeps the finished parts of long work.
"""

import os
from typing import TYPE_CHECKING

from flashjvp_commands.extras import needed_by_commands

if TYPE_CHECKING:
    from .training.checkpoint import LoadedModel

needed_by_commands("tvm_ref", "train")


def from_pretrained(folder: str | os.PathLike[str], *, device: str = "cpu") -> "LoadedModel":
    """Loads a network that `tvm_ref.export` wrote, or that `tvm_ref.sample` takes: (model, config).

    folder: a local path; nothing is fetched. device: such as "cpu" or "cuda:1". The model is in evaluation mode and has
    no gradients; config has the settings of its run. No pickle is read.

    Raises CheckpointError, ConfigError or OSError, naming the file.
    """
    from pathlib import Path

    import torch

    from .training.converted import load_model

    return load_model(Path(folder), device=torch.device(device))
