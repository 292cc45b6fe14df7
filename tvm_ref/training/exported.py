"""A network as a folder in the style of the Hugging Face Hub: model.safetensors, config.json and README.md.

config.json holds all settings of the run but for its paths; README.md is a model card that says what they say.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import flashjvp

from ..data.safetensors_file import write_safetensors
from ..data.safetensors_header import read_header
from ..model.dit import DiT, DiTConfig
from .checkpoint import MANIFEST, CheckpointError, LoadedModel
from .config import TrainConfig, load_config, save_config

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NO_RUN = "runs/exported"


def is_exported(path: Path) -> bool:
    """Whether a path is such a folder, and no checkpoint."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and not (path / MANIFEST).is_file()


def write_exported(folder: Path, network: DiT, config: TrainConfig) -> None:
    """Writes a network and the settings that it was trained with. Raises OSError, as `write_whole`."""

    def write(partial: Path) -> None:
        partial.mkdir()
        write_safetensors(network.state_dict(), partial / WEIGHTS, {"format": "pt"})
        save_config(without_paths(config), partial / CONFIG)
        (partial / CARD).write_text(model_card(network, config))

    write_whole(folder, write)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a folder that appears as `folder` once it is complete.

    Raises OSError, also if there is something but an empty folder.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_exported(folder: Path, device: torch.device) -> LoadedModel:
    """Reads such a folder. Raises ConfigError for settings that cannot be read, CheckpointError for other weights."""
    config = load_config(folder / CONFIG)
    return LoadedModel(network_of(folder / WEIGHTS, config.model).to(device), config)


def network_of(path: Path, config: DiTConfig) -> DiT:
    """Makes the network of these settings with the weights in a safetensors file.

    Raises CheckpointError if they are those of another network, OSError or UntrustedFileError for another file.
    """
    read_header(path)
    if config.least_weights > path.stat().st_size:
        raise CheckpointError(f"{path}: expected the weights of the network in its settings, got too few bytes")
    model = DiT(config).requires_grad_(False).eval()
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected the weights of the network in its settings ({error})") from error
    return model


def without_paths(config: TrainConfig) -> TrainConfig:
    """The settings without paths, which mean nothing on another machine. Of an archive its name stays."""
    run = replace(config.run, out=NO_RUN, resume="", init="", vae="")
    return replace(config, run=run, data=replace(config.data, path=Path(config.data.path).name or config.data.path))


def model_card(network: DiT, config: TrainConfig) -> str:
    """A README.md of what the settings say."""
    model, loss = config.model, config.loss
    low, high = loss.w_random or (loss.w, loss.w)
    weights = sum(parameter.numel() for parameter in network.parameters())
    facts = {
        "network": f"DiT, {model.depth} blocks of width {model.width}, {model.heads} heads, patch {model.patch}",
        "numbers in the weights": f"{weights:,}",
        "input": f"{model.channels} x {model.image_size} x {model.image_size}",
        "data": config.data.name if config.data.latents is None else f"latents, normalised as {config.data.latents}",
        "classes": model.num_classes or "none",
        "objective": loss.objective,
        "guidance scale in training": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "displacement": "(s - t) w F" if loss.scaled else "(s - t) F",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: flashjvp
---

# A network of tvm_ref

Written by flashjvp {flashjvp.__version__} from the settings of the run; config.json has all of them.

| | |
|---|---|
{table}

```python
import tvm_ref

network, config = tvm_ref.from_pretrained("FOLDER")
```

```sh
tvm-sample FOLDER --nfe 1 --out samples.png
```
"""
