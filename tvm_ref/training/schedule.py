"""Learning-rate schedules: constant, cosine, and inverse square root, each after a linear warm-up."""

import math

from .config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step `step`, from 0, in a run of `steps` steps; n = step + 1, w warm-up steps:

        min(1, n / w) lr                                       constant
        min(1, n / w) lr (1 + cos(pi step / steps)) / 2        cosine
        min(1, n / w) lr / sqrt(max(n / decay_steps, 1))       inverse-sqrt, EDM2, arXiv 2312.02696

    A function of the arguments alone, so a resumed run goes on with it.
    """
    number = step + 1
    rate = optim.lr * min(1.0, number / max(1, optim.warmup_steps))
    if optim.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2
    if optim.schedule == "inverse-sqrt":
        return rate / math.sqrt(max(number / optim.decay_steps, 1.0))
    return rate
