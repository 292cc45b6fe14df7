"""Experiment `times`: the distributions of the times of a training step, at equal steps."""

from ..objective.time_sampling import KINDS
from .by_evaluations import by_evaluations

EXPERIMENT = by_evaluations(
    "times",
    "Which distribution of the times gives the best samples for a number of evaluations?",
    {kind: {"times.kind": kind} for kind in KINDS},
)
