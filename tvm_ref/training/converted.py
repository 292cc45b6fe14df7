"""Networks to sample, to evaluate or to train on from: checkpoints, runs, exported folders, and converted weights."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import torch

from ..data.safetensors_header import read_header
from ..data.untrusted import parse_json
from ..model.dit import DiTConfig
from . import checkpoint
from .checkpoint import CheckpointError, LoadedModel
from .config import ConfigError, TrainConfig, config_of, load_config
from .exported import WEIGHTS, is_exported, network_of, read_exported
from .presets import PRESETS

SETTINGS = "train_config"  # the key of a TrainConfig in the metadata of a converted file
NOT_IN_WEIGHTS = ("norm", "qk_norm", "modulation_norm", "spectral_time_mlp", "attention_backend")
FREE = ("spectral_time_mlp", "attention_backend")  # how weights start and how they run, not what they mean


def named_settings(source: str) -> TrainConfig:
    """Returns the settings that `source` names, a preset or a config.json. Raises ConfigError if it is neither."""
    if source in PRESETS:
        return PRESETS[source]()
    if not Path(source).exists():
        raise ConfigError(f"settings: expected a config.json or one of {', '.join(PRESETS)}, got {source!r}")
    return load_config(Path(source))


def check_network(model: DiTConfig, config: TrainConfig, source: str) -> None:
    """Raises ConfigError if settings, from `source`, describe another network than `model`, inferred from weights."""
    _same(model, config.model, NOT_IN_WEIGHTS, source)


def as_metadata(config: TrainConfig) -> dict[str, str]:
    """The entry of a converted file that `load_model` reads."""
    return {SETTINGS: json.dumps(dataclasses.asdict(config))}


def load_model(path: Path, *, device: torch.device, weights: Literal["ema", "raw"] = "ema") -> LoadedModel:
    """Loads a network from a checkpoint, the folder of a run, an exported folder, or a converted .safetensors file.

    weights: as in checkpoint.load_model; an exported folder and a converted file have one set only. No pickle is read.
    Raises CheckpointError for a file without settings or with weights that do not fit them, otherwise as
    checkpoint.load_model.
    """
    if path.name == WEIGHTS and is_exported(path.parent):
        path = path.parent
    if is_exported(path):
        return read_exported(path, device)
    if path.suffix != ".safetensors":
        return checkpoint.load_model(path, device=device, weights=weights)
    text = read_header(path).pop("__metadata__", {}).get(SETTINGS)
    if text is None:
        raise CheckpointError(f"{path} holds no settings of its run: convert it with --settings PRESET")
    config = config_of(parse_json(text.encode()), path)
    return LoadedModel(network_of(path, config.model).to(device), config)


def check_start(config: TrainConfig, start: LoadedModel, path: str) -> None:
    """Raises ConfigError unless a run with `config` can go on from the weights `start`."""
    _same(start.config.model, config.model, FREE, path)
    if start.config.loss.scaled != config.loss.scaled:
        raise ConfigError(f"loss.scaled: expected {start.config.loss.scaled} as in {path}, got {config.loss.scaled}")


def _same(one: DiTConfig, other: DiTConfig, ignored: tuple[str, ...], where: str) -> None:
    for field in dataclasses.fields(DiTConfig):
        expected, got = getattr(one, field.name), getattr(other, field.name)
        if field.name not in ignored and expected != got:
            raise ConfigError(f"model.{field.name}: expected {expected!r} (the weights), got {got!r} ({where})")
