"""The published code of Terminal Velocity Matching, imported from a checkout: called, never copied."""

import contextlib
import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvm_ref.model.dit import DiTConfig
from tvm_ref.objective import path
from tvm_ref.objective.loss import Batch, Terms


@contextlib.contextmanager
def imported(checkout: Path) -> Iterator[Any]:
    """The published module `training.wrapper`. Where timm is not installed its two layers have stand-ins.

    Raises ModuleNotFoundError if PATH is no checkout or lacks a package.
    """
    if not (checkout / "training" / "wrapper.py").is_file():
        raise ModuleNotFoundError("expected a checkout of lumalabs/tvm, with training/wrapper.py in it")
    sys.path.insert(0, str(checkout.resolve()))
    try:
        if importlib.util.find_spec("timm") is None:
            _stand_in_for_timm()
        yield importlib.import_module("training.wrapper")
    finally:
        sys.path.remove(str(checkout.resolve()))


@contextlib.contextmanager
def with_dense_attention(checkout: Path) -> Iterator[Any]:
    """`imported`, with dense attention in the type of its inputs in place of the published kernel."""
    with imported(checkout) as wrapper:
        network = importlib.import_module("training.dit")
        with mock.patch.multiple(network, sdpa_jvp=_dense_attention, torch=_UnderAutocast()):
            yield wrapper


class _UnderAutocast:
    """torch, except that it says autocast is on: otherwise the published attention rounds to bfloat16."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: True) if name == "is_autocast_enabled" else getattr(torch, name)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _stand_in_for_timm() -> None:
    """PatchEmbed and Mlp as the published network calls them."""

    class PatchEmbed(nn.Module):
        def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool) -> None:
            super().__init__()
            self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
            self.proj = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    class Mlp(nn.Module):
        def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
            super().__init__()
            self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
            self.fc2 = nn.Linear(hidden_features, in_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    module = types.ModuleType("timm.models.vision_transformer")
    for found in (PatchEmbed, Mlp):
        found.__module__ = module.__name__
        found.__qualname__ = found.__name__
        setattr(module, found.__name__, found)
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module


def build(wrapper: Any, config: DiTConfig, scaled: bool, time_specinit: bool = False, **options: Any) -> Any:
    """The published module of this size, in float32 unless `options` of its constructor say otherwise."""
    size = {"hidden_size": config.width, "depth": config.depth, "num_heads": config.heads}
    size |= {"patch_size": config.patch, "num_classes": config.num_classes}

    def network(*, img_channels: int, out_channels: int, label_dim: int, **rest: Any) -> Any:
        return wrapper.DiT(**size, **rest)

    with mock.patch.object(wrapper, "DiT_XL_2_18h", network), contextlib.redirect_stdout(None):
        return wrapper.TVMWrapper(
            config.image_size, config.channels, config.num_classes, do_scale_param=scaled,
            time_specinit=time_specinit, **{"data_type": "fp32"} | options,
        )  # fmt: skip


def output(network: Any, batch: Batch) -> Tensor:
    """What the published network says of a batch at (x_t, t, s)."""
    x_t, t, s, classes, beta = _given(network, batch)
    return network.forward_model(x_t, t, s, classes, beta)


def terms(network: Any, target: Any, batch: Batch) -> Terms:
    """The published loss and its two terms, each [B], of a batch as tvm_ref draws it."""
    x_t, t, s, classes, beta = _given(network, batch)
    x_s2, s2 = path.point(batch.x0, batch.x1, batch.s2), batch.s2[:, None, None, None]
    with contextlib.redirect_stdout(None):
        total, logs = network(x_t, x_s2, t, s, s2, classes, beta, batch.x1 - batch.x0, teacher_model=target)
    return Terms(total, logs["terminal_loss"], logs["fm_loss"])


def _given(network: Any, batch: Batch) -> tuple[Tensor, ...]:
    """x_t, t, s, classes and beta as the published network takes them: no class is a row of zeros."""
    t, s, beta = (z[:, None, None, None] for z in (batch.t, batch.s, 1 / batch.w))
    classes = F.one_hot(batch.labels, network.label_dim + 1)[:, :-1].float()
    return path.point(batch.x0, batch.x1, batch.t), t, s, classes, beta


def commit_of(checkout: Path) -> str:
    """The commit that a checkout is at, or "unknown"."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
