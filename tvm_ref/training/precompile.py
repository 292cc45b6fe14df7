"""Compiles the attention kernels of a run in a thread of its own, while Python traces the blocks of its first step."""

import threading
import warnings

import torch

import flashjvp

from .config import TrainConfig
from .step import AUTOCAST

WITHOUT_JVP = ("flow", "shortcut")  # objectives whose networks are called without tangents


def precompile_attention(config: TrainConfig, device: torch.device) -> threading.Thread | None:
    """Starts the thread; None where nothing is to be compiled: on a CPU, or with another backend than Triton's.

    Where no kernel serves these calls, nothing is said: another backend does. What else goes wrong is a warning, and
    the step compiles what it needs.
    """
    if device.type != "cuda" or config.model.attention_backend not in (None, "triton"):
        return None
    thread = threading.Thread(target=_compile, args=(config, device), name="precompile_attention")
    thread.start()
    return thread


def _compile(config: TrainConfig, device: torch.device) -> None:
    model, loss = config.model, config.loss
    dtype = AUTOCAST.get(config.run.precision, torch.float32)
    # Tangents, and whether a gradient flows through both outputs.
    calls = [] if loss.objective in WITHOUT_JVP else [("qkv", loss.objective == "tvm" and not loss.detach)]
    try:
        for tangents, backward in [*calls, ("", True)]:
            flashjvp.precompile(
                model.head_dim, dtype, tangents=tangents, backward=backward, tokens=model.grid**2, device=device
            )
    except flashjvp.UnsupportedError:
        return
    except Exception as error:  # whatever a compiler raises: this thread has nobody to raise it to
        warnings.warn(f"attention is not compiled ahead of the first step: {error}", stacklevel=1)
