"""What is measured of a trained network: quality of samples for numbers of evaluations and scales of guidance."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data import point_sets, toys
from ..data.dataset import DataConfig, open_dataset
from ..quality.evaluation import Sampling, cycle_errors, square_figures, toy_figures
from ..quality.feature_judge import Distances, feature_judge, imagenet_judge
from ..sampling.sampler import steps_of
from ..training.config import TrainConfig
from ..training.parallel import World
from ..training.report import scale_to_sample_with
from .cells import Setting
from .training import Measure, Measured, Trained

AT_ONCE = 1000
IMAGES = ("digits", "fashion")
FRESH = 1000  # added to a seed for fresh points that are neither training data nor those of another seed


def quality(setting: Setting, nfes: Sequence[int], samples: int, scales: Sequence[float] | None = None) -> Measure:
    """Quality of `samples` samples for each of some numbers of network evaluations, and scales w of guidance.

    scales: None: that of training. The noise has the seed of the run, so seeds differ in all that is random.
    """

    def measure(trained: Trained) -> Iterator[Measured]:
        for w in scales or [scale_to_sample_with(trained.config.loss)]:
            for nfe in nfes:
                labels = _labels(trained.config.data, samples, setting.world)
                sampling = sampling_with(trained.config, w)
                drawn = torch.cat([x.cpu() for x in sampling.draw(trained.model, labels, nfe)])
                found = _figures(setting, trained.config.data, drawn, labels, trained.config.run.seed)
                yield from (Measured(name, value, nfe, w) for name, value in found.items())

    return measure


def cycles(trained: Trained) -> Iterator[Measured]:
    """The cycle errors, figure `cycle_error_t0.5` and so on."""
    found = cycle_errors(trained.model, open_dataset(trained.config.data), sampling_with(trained.config))
    yield from (Measured(name, value) for name, value in found.items())


def sampling_with(config: TrainConfig, w: float | None = None) -> Sampling:
    """How a network of these settings is sampled; w: None: with the scale of its training."""
    loss = config.loss
    scale = scale_to_sample_with(loss) if w is None else w
    kind = steps_of(loss.objective)
    return Sampling(w=scale, scaled=loss.scaled, seed=config.run.seed, batch=AT_ONCE, kind=kind)


def real_quality(setting: Setting, data: DataConfig, samples: int, seed: int) -> Iterator[Measured]:
    """What as many real samples get: drawn with replacement from the images, or fresh points."""
    if data.name in IMAGES:
        found = feature_judge(data, setting.world.device).bootstrap(samples, seed)._asdict()
        if setting.imagenet_classifier is not None:
            judge = imagenet_judge(data, setting.imagenet_classifier, setting.world.device)
            found |= _named(judge.bootstrap(samples, seed))
    elif data.name == "squares":
        other = torch.from_numpy(point_sets.squares(samples, 2 * FRESH + seed))
        found = square_figures(other, _fresh_squares(samples, seed))
    else:
        other = torch.from_numpy(toys.toy_points("eight_gaussians", samples, 2 * FRESH + seed))
        found = toy_figures("eight_gaussians", other, _fresh_points(samples, seed))
    yield from (Measured(name, value) for name, value in found.items())


def _figures(setting: Setting, data: DataConfig, drawn: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    if data.name in IMAGES:
        found = feature_judge(data, setting.world.device).judge(drawn, labels)._asdict()
        if setting.imagenet_classifier is not None:
            found |= _named(imagenet_judge(data, setting.imagenet_classifier, setting.world.device).judge(drawn))
        return found
    if data.name == "squares":
        return square_figures(point_sets.as_sets(drawn), _fresh_squares(len(drawn), seed))
    return toy_figures("eight_gaussians", drawn.flatten(1), _fresh_points(len(drawn), seed))


def _named(of_imagenet: Distances) -> dict[str, float]:
    return {f"{name}_imagenet": value for name, value in of_imagenet._asdict().items()}


def _labels(data: DataConfig, samples: int, world: World) -> Tensor:
    """Labels in the proportions of the real images; zeros for data without classes."""
    if data.name not in IMAGES:
        return torch.zeros(samples, dtype=torch.int64)
    return torch.from_numpy(np.resize(feature_judge(data, world.device).labels.numpy(), samples))


def _fresh_squares(count: int, seed: int) -> Tensor:
    return torch.from_numpy(point_sets.squares(count, FRESH + seed))


def _fresh_points(count: int, seed: int) -> Tensor:
    return torch.from_numpy(toys.toy_points("eight_gaussians", count, FRESH + seed))
