"""Generates many samples in batches, reproducibly: sample i depends only on (weights, seed, i, label, w, steps)."""

import math
from collections.abc import Iterator

from torch import Tensor

from flashjvp_commands.arguments import SEEDS

from ..data.noise import indexed_normals
from ..model.dit import DiT
from ..objective.loss import LossConfig
from ..unsuitable import UnsuitableError
from .sampler import Steps, sample


def guidance_scale(config: LossConfig, guidance_input: bool, w: float | None) -> float:
    """Returns the guidance scale to sample with: `w`, or that of training if it is None.

    Raises UnsuitableError if `w` is None but training used random guidance, or if the network has no guidance input and
    `w` differs from that of training. A network that takes w also takes one that it was not trained with, see
    `untrained`.
    """
    if w is not None and not 0 < w < math.inf:
        raise UnsuitableError(f"w: expected a positive number, got {w}")
    if config.w_random is not None:
        if w is None:
            low, high = config.w_random
            raise UnsuitableError(
                f"the network was trained with random guidance: expected w from {low} to {high}, got {w}"
            )
        return w
    if w is None:
        return config.w
    if not guidance_input and w != config.w:
        raise UnsuitableError(f"the network takes no guidance and was trained with w = {config.w}, got w = {w}")
    return w


def untrained(config: LossConfig, w: float) -> str | None:
    """Says in one line that a network was not trained with guidance scale `w`; None if it was."""
    low, high = config.w_random or (config.w, config.w)
    if low <= w <= high:
        return None
    trained = f"w = {low:g}" if low == high else f"w from {low:g} to {high:g}"
    return f"warning: the network was trained with {trained}, so expect worse samples with w = {w:g}"


def generate(
    model: DiT,
    labels: Tensor,
    *,
    w: float,
    steps: int,
    scaled: bool,
    seed: int,
    batch: int,
    start: int = 0,
    kind: Steps = "jumps",
) -> Iterator[Tensor]:
    """Yields one sample for each of `labels` int64 [n], in order, as float32 [<= batch, C, H, W] on model's device.

    steps: network evaluations for each sample (NFE); scaled: LossConfig.scaled; start: number i of the first sample;
    kind: as in `sample`, `steps_of` the objective. The noise is the same on every device and for every batch size.

    Raises ValueError for labels that the network does not have.
    """
    config = model.config
    if len(labels) < 1 or batch < 1:
        raise ValueError(f"expected at least one label and batch >= 1, got {len(labels)} labels and batch {batch}")
    if not 0 <= labels.min() <= labels.max() <= config.num_classes:
        raise ValueError(
            f"expected labels from 0 to {config.num_classes} ({config.num_classes} = no class), "
            f"got {labels.min()} to {labels.max()}"
        )
    device = next(model.parameters()).device
    shape = (config.channels, config.image_size, config.image_size)
    for first in range(0, len(labels), batch):
        chunk = labels[first : first + batch]
        here = range(start + first, start + first + len(chunk))

        def noise(number: int, here: range = here) -> Tensor:
            return indexed_normals(seed + SEEDS * number, here, shape).to(device)

        labels_here = chunk.to(device)
        yield sample(
            model, noise(0), labels_here, w, steps, scaled, guidance=config.guidance, kind=kind, new_noise=noise
        )
