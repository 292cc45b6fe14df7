"""Draws the times of a training step: t >= s for the terminal-velocity term, s' for the flow-matching term."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..finite import require_finite

Kind = Literal["gap", "gap*", "trunc", "clamp", "uniform"]
KINDS = ("gap", "gap*", "trunc", "clamp", "uniform")


class Times(NamedTuple):
    """Times [B] in [0, 1], where 1 is noise: a jump from t to s <= t, and s2 (s') for the flow-matching term."""

    t: Tensor
    s: Tensor
    s2: Tensor


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Distribution of the times t > s of a jump, and of s' of the flow-matching term (Zhou et al., arXiv 2511.19797).

    - gap: g ~ LN(gap), s ~ LN(s) truncated to [0, 1 - g], t = s + g, s' = s
    - gap*: the same, and s' ~ LN(s), independent of t and s
    - trunc: t ~ LN(t), s ~ LN(s) truncated to [0, t], s' = s
    - clamp: t ~ LN(t), s = min(t, s1) with s1 ~ LN(s), s' = s
    - uniform: t and s are the larger and the smaller of two uniform numbers, s' = s

    LN, logit-normal, is the distribution of sigmoid(N(mu, sigma^2)).

    Raises:
        ValueError: for a value out of range.
    """

    kind: Kind = "gap*"  # one of the distributions above
    gap_mu: float = -0.8  # mean of logit(g)
    gap_sigma: float = 1.0  # standard deviation of logit(g)
    s_mu: float = -0.4  # mean of logit(s), and of logit(s')
    s_sigma: float = 1.0  # standard deviation of logit(s), and of logit(s')
    t_mu: float = 1.0  # mean of logit(t), for trunc and clamp
    t_sigma: float = 1.0  # standard deviation of logit(t), for trunc and clamp
    equal_share: float = 0.0  # probability that s is then set to t; t and s' stay as drawn

    def __post_init__(self) -> None:
        require_finite(self)
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        for name in ("gap_sigma", "s_sigma", "t_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.equal_share <= 1:
            raise ValueError(f"equal_share: expected a probability in [0, 1], got {self.equal_share!r}")


def sample_times(config: TimeConfig, batch: int, generator: Generator) -> Times:
    """Draws the times of `batch` images, each float32 [batch] on the CPU. `generator` must be a CPU generator.

    Times are drawn in float64; 0 <= s <= t <= 1 also holds after rounding to float32.
    """
    t, s = _pair(config, batch, generator)
    s2 = s
    if config.kind == "gap*":
        s2 = _logit_normal(config.s_mu, config.s_sigma, batch, generator)
    equal = _uniform(batch, generator) < config.equal_share
    return Times(t.float(), torch.where(equal, t, s).float(), s2.float())


def _pair(config: TimeConfig, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """t and s, float64."""
    if config.kind == "uniform":
        one, other = _uniform(batch, generator), _uniform(batch, generator)
        return torch.maximum(one, other), torch.minimum(one, other)
    if config.kind in ("gap", "gap*"):
        gap = _logit_normal(config.gap_mu, config.gap_sigma, batch, generator)
        s = _truncated_logit_normal(config.s_mu, config.s_sigma, 1 - gap, generator)
        return (s + gap).clamp(max=1.0), s
    t = _logit_normal(config.t_mu, config.t_sigma, batch, generator)
    if config.kind == "trunc":
        return t, _truncated_logit_normal(config.s_mu, config.s_sigma, t, generator)
    return t, torch.minimum(t, _logit_normal(config.s_mu, config.s_sigma, batch, generator))


def _uniform(batch: int, generator: Generator) -> Tensor:
    return torch.rand(batch, dtype=torch.float64, generator=generator)


def _logit_normal(mu: float, sigma: float, batch: int, generator: Generator) -> Tensor:
    return torch.sigmoid(mu + sigma * torch.randn(batch, dtype=torch.float64, generator=generator))


def _truncated_logit_normal(mu: float, sigma: float, upper: Tensor, generator: Generator) -> Tensor:
    """Draws logit-normal numbers truncated to at most `upper` [B], by inverting their cumulative distribution."""
    below = torch.special.ndtr((torch.logit(upper) - mu) / sigma)  # P(number <= upper)
    quantile = torch.special.ndtri(_uniform(len(upper), generator) * below)
    return torch.minimum(torch.sigmoid(mu + sigma * quantile), upper)
