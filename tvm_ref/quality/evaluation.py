"""Evaluation of a network for each kind of data: which samples are drawn, and which metrics are computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import point_sets
from ..data.dataset import BatchOrder, DataConfig, Dataset, open_dataset
from ..data.digits import real_digits
from ..data.point_sets import as_sets, misfit, squares
from ..data.toys import TRAINING_SEED, ToyName, nearest_gaussian, toy_points
from ..model.dit import DiT
from ..sampling.generate import generate
from ..sampling.sampler import Steps, cycle_error
from .digit_classifier import DigitJudge
from .diversity import variance_ratio
from .feature_judge import feature_judge
from .metrics import precision_recall, wasserstein2

CYCLE_TIMES = (0.25, 0.5, 1.0)
CYCLE_IMAGES = 64
CYCLE_STEPS = 16  # steps of Heun's method from the data to time t


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn: guidance scale w, LossConfig.scaled, seed of noise and labels, batch size, and the kind of
    steps that the network was trained for."""

    w: float
    scaled: bool
    seed: int
    batch: int
    kind: Steps = "jumps"

    def draw(self, model: DiT, labels: Tensor, nfe: int, start: int = 0) -> Iterator[Tensor]:
        """Yields batches with one sample for each of `labels`; see `generate`."""
        return generate(
            model, labels, w=self.w, steps=nfe, scaled=self.scaled, seed=self.seed, batch=self.batch, start=start,
            kind=self.kind,
        )  # fmt: skip


class Evaluation(NamedTuple):
    """Metrics by name: by_nfe for each NFE, context for those that do not depend on it."""

    samples: int
    by_nfe: dict[int, dict[str, float]]
    context: dict[str, float]


def evaluate_toy(model: DiT, name: ToyName, nfes: tuple[int, ...], count: int, sampling: Sampling) -> Evaluation:
    """Evaluates a network of 2-D points: the figures of `toy_figures` of `count` samples beside as many fresh points.

    Context: the same figures of other fresh points (w2_fresh and so on), which is what a perfect network reaches on
    average; and the cycle errors. Fresh points are not training data. Raises ValueError for fewer than four samples.
    """
    one, two = (torch.from_numpy(toy_points(name, count, TRAINING_SEED + 1 + i)) for i in range(2))
    labels = torch.zeros(count, dtype=torch.int64)
    by_nfe = {
        nfe: toy_figures(name, torch.cat([x.cpu() for x in sampling.draw(model, labels, nfe)]).flatten(1), one)
        for nfe in nfes
    }
    context = {f"{figure}_fresh": value for figure, value in toy_figures(name, two, one).items()}
    context |= cycle_errors(model, open_dataset(DataConfig(name=name)), sampling)
    return Evaluation(count, by_nfe, context)


def toy_figures(name: ToyName, points: Tensor, fresh: Tensor) -> dict[str, float]:
    """Compares points [n, 2] with fresh ones. w2: exact 2-Wasserstein distance; precision and recall.

    Of the eight Gaussians also variance: that around each, over that of the fresh points. Each point counts to the
    nearest one.
    """
    figures = {"w2": wasserstein2(points, fresh), **precision_recall(points, fresh)._asdict()}
    if name == "eight_gaussians":
        figures["variance"] = variance_ratio(points, nearest_gaussian(points), fresh, nearest_gaussian(fresh))
    return figures


def evaluate_squares(model: DiT, nfes: tuple[int, ...], count: int, sampling: Sampling) -> Evaluation:
    """Evaluates a network of sets of four points: the figures of `square_figures`; context as in `evaluate_toy`."""
    one, two = (torch.from_numpy(squares(count, point_sets.TRAINING_SEED + 1 + i)) for i in range(2))
    labels = torch.zeros(count, dtype=torch.int64)
    by_nfe = {
        nfe: square_figures(as_sets(torch.cat([x.cpu() for x in sampling.draw(model, labels, nfe)])), one)
        for nfe in nfes
    }
    context = {f"{figure}_fresh": value for figure, value in square_figures(two, one).items()}
    context |= cycle_errors(model, open_dataset(DataConfig(name="squares")), sampling)
    return Evaluation(count, by_nfe, context)


def square_figures(sets: Tensor, fresh: Tensor) -> dict[str, float]:
    """Compares sets of four points [n, 4, 2] with fresh squares, as vectors [n, 8]. w2: exact 2-Wasserstein distance;
    precision and recall; misfit: the RMS distance of the points from the corners of squares."""
    figures = {"w2": wasserstein2(sets.flatten(1), fresh.flatten(1))}
    return figures | precision_recall(sets.flatten(1), fresh.flatten(1))._asdict() | {"misfit": misfit(sets)}


def evaluate_fashion(model: DiT, data: DataConfig, nfes: tuple[int, ...], count: int, sampling: Sampling) -> Evaluation:
    """Evaluates a network of Fashion-MNIST: the figures of `FeatureJudge` for `count` samples.

    Context: the classifier's accuracy on the test set; the figures of real images drawn with replacement; and the cycle
    errors. Raises as `open_dataset`.
    """
    judge = feature_judge(data, next(model.parameters()).device)
    labels = torch.from_numpy(np.resize(judge.labels.numpy(), count))
    by_nfe = {
        nfe: judge.judge(torch.cat([x.cpu() for x in sampling.draw(model, labels, nfe)]), labels)._asdict()
        for nfe in nfes
    }
    context = {"judge_accuracy": judge.held_out_accuracy}
    real = judge.bootstrap(count, sampling.seed)._asdict()
    context |= {f"{figure}_bootstrap": value for figure, value in real.items() if figure != "accuracy"}
    context |= cycle_errors(model, open_dataset(data), sampling)
    return Evaluation(count, by_nfe, context)


def evaluate_digits(model: DiT, nfes: tuple[int, ...], count: int, sampling: Sampling) -> Evaluation:
    """Evaluates a network of digits: the figures of `DigitJudge` for `count` samples.

    The samples have the labels of the real digits, repeated as needed. Context: the classifier's accuracy on held-out
    digits; the figures but accuracy of real digits drawn with replacement (frechet_bootstrap and so on); and the cycle
    errors. Raises ValueError for samples too few to have neighbours, or two of a class.
    """
    judge = DigitJudge()
    labels = torch.from_numpy(np.resize(real_digits().labels, count))
    by_nfe = {}
    for nfe in nfes:
        quality = judge.judge(torch.cat([x.cpu() for x in sampling.draw(model, labels, nfe)]), labels)
        by_nfe[nfe] = quality._asdict()
    real = judge.bootstrap(count, sampling.seed)._asdict()
    context = {"judge_accuracy": judge.held_out_accuracy}
    context |= {f"{figure}_bootstrap": value for figure, value in real.items() if figure != "accuracy"}
    context |= cycle_errors(model, open_dataset(DataConfig(name="digits")), sampling)
    return Evaluation(count, by_nfe, context)


def cycle_errors(model: DiT, dataset: Dataset, sampling: Sampling) -> dict[str, float]:
    """Computes the mean of `sampler.cycle_error` over 64 training items, for each of three times t.

    It is an RMS over the elements of an item, in units of the data.
    """
    device = next(model.parameters()).device
    indices = BatchOrder(seed=sampling.seed, size=len(dataset)).indices(0, 0, 1, min(CYCLE_IMAGES, len(dataset)))
    x0, labels = dataset.get(indices, torch.Generator().manual_seed(sampling.seed))
    x0, labels = x0.to(device), labels.to(device)
    guidance = model.config.guidance
    return {
        f"cycle_error_t{t:g}": cycle_error(
            model, x0, labels, sampling.w, t, CYCLE_STEPS, sampling.scaled, guidance=guidance
        )
        .mean()
        .item()
        for t in CYCLE_TIMES
    }
