"""Chooses who implements the derivatives: autograd.py, or public_autograd.py where PyTorch lacks a name that it needs.

Both have `attention` and `attention_jvp` of checked operands.
"""

import torch

from .. import _torch
from .._torch import probe
from ..performance import warn_once
from . import operators as operators  # importing it registers what the operators do

__all__ = ["BY_LEVEL", "attention", "attention_jvp"]

# Whether PyTorch has what autograd.py needs, and it does what it did when that was written.
BY_LEVEL = _torch.PER_LEVEL and (torch.__version__.startswith(_torch.TRIED) or probe.holds())

if BY_LEVEL:
    from .autograd import Gradients as Gradients  # importing it registers the derivatives of the operators
    from .autograd import attention, attention_jvp
    from .autograd import recorded as recorded
else:
    from .public_autograd import attention, attention_jvp

    warn_once(
        f"torch {torch.__version__} has changed what flashjvp builds its derivatives on. They are right, take about "
        "twice the time, and torch.compile breaks its graph at them. Releases that were tried begin with "
        f"{', '.join(_torch.TRIED)}"
    )
