"""From the variances of a result's errors to a bound on its error, which a correct kernel almost never exceeds.

The bound is one that a correct result exceeds with probability below 4e-6 (z = 4.5 standard deviations). |e|^2 is a sum
of squares of independent errors with variances w_i. It is about sum(w) / r times a chi-squared of r = sum(w)^2 /
sum(w^2) degrees of freedom (Welch and Satterthwaite), whose quantile is r (1 - 2/(9r) + z sqrt(2/(9r)))^3 (Wilson and
Hilferty). For many elements the bound is hardly more than sqrt(sum(w)), the rms error; for one element it is 5 standard
deviations.

Errors that move together count as one: an error of a row statistic as one a query row, roundings of tile elements as
the effective number of keys (or queries) that P gives weight to. Errors e_n of tile elements act along the rows y_n
that they multiply: r = 1 / (1 / n + (1 - 1 / n) c), c the mean squared cosine between two of these rows, so parallel
ones (constant keys) leave r = 1. An error of a row statistic acts along the same rows: it is as parallel to the e_n as
they are to each other, 1 / r. For the worst of n rows z^2 grows by 2 log n.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STANDARD_DEVIATIONS = 4.5


@dataclass(frozen=True)
class Bound:
    """What the error of one tensor stays under in a correct kernel: norms of the whole and of the rows [..., rows]."""

    whole: float
    rows: Tensor


@dataclass(frozen=True)
class Noise:
    """Variance of the error of one tensor, [..., rows, width], by what moves together."""

    spread: Tensor  # roundings of tile elements: `sources` [..., rows] independent ones for each row
    sources: Tensor
    shared: Tensor  # errors of statistics of query rows: `shared_sources` independent ones for each row
    shared_sources: Tensor
    stored: Tensor  # rounding of the result itself: independent for each element
    query_rows: int  # so many row statistics exist
    alignment: Tensor  # [..., 1], mean squared cosine of the rows that errors multiply: 1 if all are parallel

    def and_stored(self, variance: Tensor) -> "Noise":
        """The same with further roundings that are independent for each element."""
        return replace(self, stored=self.stored + variance)

    def bound(self) -> Bound:
        """The bound that a correct result keeps."""
        spread, shared, stored = (x.sum(-1) for x in (self.spread, self.shared, self.stored))
        rank, shared_rank = (1 / (1 / n + (1 - 1 / n) * self.alignment) for n in (self.sources, self.shared_sources))
        total = spread + shared + stored
        cross = 2 * (spread * shared / rank + (spread + shared) * stored * self.alignment)
        squares = spread.square() / rank + shared.square() / shared_rank + self.stored.square().sum(-1) + cross
        together = shared.sum().square() / max(self.query_rows, 1)
        z2 = STANDARD_DEVIATIONS**2
        rows = _quantile(total, squares, math.sqrt(z2 + 2 * math.log(total.numel())))
        whole = _quantile(total.sum(), torch.maximum(squares.sum(), together), STANDARD_DEVIATIONS)
        return Bound(whole.item(), rows)

    def inner_product_bound(self, weight: Tensor, is_query_side: bool) -> float:
        """Bound of |sum(error * weight)|: Cauchy and Schwarz for what may move together, variances add for the rest.

        Roundings of tile elements move one row. An error of a statistic moves a row of the query side, but all rows
        of the key side.
        """
        squares = weight.double().square().sum(-1)
        shared = self.shared.sum(-1)
        variance = ((self.spread + self.stored).sum(-1) * squares).sum()
        variance += (shared * squares).sum() if is_query_side else shared.sum() * squares.sum()
        return STANDARD_DEVIATIONS * variance.sqrt().item()


def _quantile(total: Tensor, squares: Tensor, z: float) -> Tensor:
    """Norm of an error at z standard deviations; `total` and `squares` sum its independent parts' variances."""
    spread = (2 / 9 * squares / total.square()).nan_to_num(0.0)  # 2 / (9 r)
    return (total * (1 - spread + z * spread.sqrt()) ** 3).sqrt()


def equal_heads(q: Tensor, groups: int) -> int:
    """How many query heads of a group are equal, as where q is expanded over them: their scores round alike."""
    if groups < 2:
        return 1
    heads = q.unflatten(-3, (q.shape[-3] // groups, groups))
    return groups if torch.equal(heads, heads.narrow(-3, 0, 1).expand_as(heads)) else 1


def alignment(*factors: Tensor) -> Tensor:
    """Mean squared cosine between two rows of a factor, [..., 1]: 1 / width in random directions; the largest one."""
    largest = factors[0].new_zeros(1)
    for x in factors:
        norms = x.square().sum(-1)
        itself = norms.square().sum(-1)
        pairs = (x.mT @ x).square().sum((-1, -2)) - itself
        cosine = pairs / (norms.sum(-1).square() - itself)
        largest = torch.maximum(largest, cosine.nan_to_num(0.0).clamp(1 / x.shape[-1], 1.0).unsqueeze(-1))
    return largest


def sources(P: Tensor, dim: int) -> Tensor:
    """Effective number of independent errors that P gives weight to along `dim`."""
    weight = (P / P.amax(dim, keepdim=True)).nan_to_num(0.0).square()
    return (weight.sum(dim).square() / weight.square().sum(dim)).nan_to_num(1.0)
