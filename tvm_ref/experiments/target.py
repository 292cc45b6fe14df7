"""Experiment `target`: the EMA of the target network."""

from .by_evaluations import by_evaluations

EXPERIMENT = by_evaluations(
    "target",
    "How fast should the target network follow the network?",
    {f"{decay:g}": {"optim.target_ema": decay} for decay in (0.0, 0.9, 0.99, 0.999)},
)
