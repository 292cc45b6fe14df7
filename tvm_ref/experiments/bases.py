"""The networks that experiments train, for each kind of data and each scale."""

from typing import Any

from ..data.dataset import open_dataset
from ..training.config import TrainConfig
from ..training.presets import PRESETS
from .cells import Setting
from .training import with_settings

QUICK_STEPS = 2
# Of every network on a CPU: as small as still learns, in the time that several experiments share.
SMALL: dict[str, Any] = {
    "model.width": 32, "model.depth": 2, "model.heads": 2, "run.batch": 64, "optim.lr": 4e-3, "optim.ema": 0.95,
}  # fmt: skip
# Of every network of Fashion-MNIST on a GPU, sized so that all experiments together should take an hour on an H200.
FULL: dict[str, Any] = {
    "model.patch": 4, "model.width": 192, "model.depth": 4, "model.heads": 3, "run.batch": 128, "run.steps": 1500,
    "run.cuda_graph": True, "optim.lr": 1e-3, "optim.warmup_steps": 100, "optim.ema": 0.995,
}  # fmt: skip
FULL_POINTS: dict[str, Any] = {
    "model.attention_backend": None, "run.steps": 1000, "run.cuda_graph": True, "optim.ema": 0.99,
}  # fmt: skip


def images(setting: Setting, steps: int) -> TrainConfig:
    """Digits on a CPU in `steps` steps, Fashion-MNIST on a GPU, whose files are read: raises as `open_dataset`."""
    if setting.scale != "full":
        return _small("digits", setting, steps)
    config = with_settings(PRESETS["fashion"](), FULL | {"data.path": setting.data_path} | _device(setting))
    open_dataset(config.data)
    return config


def squares(setting: Setting, steps: int) -> TrainConfig:
    """Sets of four points, in `steps` steps on a CPU."""
    return _points("squares", setting, steps)


def gaussians(setting: Setting, steps: int) -> TrainConfig:
    """Eight Gaussians, in `steps` steps on a CPU."""
    return _points("toy2d", setting, steps)


def _points(preset: str, setting: Setting, steps: int) -> TrainConfig:
    if setting.scale != "full":
        return _small(preset, setting, steps)
    return with_settings(PRESETS[preset](), FULL_POINTS | _device(setting))


def _small(preset: str, setting: Setting, steps: int) -> TrainConfig:
    changes = SMALL | {"run.steps": setting.pick(quick=QUICK_STEPS, small=steps, full=None)} | _device(setting)
    if preset == "toy2d":
        del changes["model.heads"]
    return with_settings(PRESETS[preset](), changes)


def _device(setting: Setting) -> dict[str, Any]:
    """Where a run computes; a CUDA graph takes a GPU."""
    kind = setting.world.device.type
    return {"run.device": kind} if kind == "cuda" else {"run.device": kind, "run.cuda_graph": False}
