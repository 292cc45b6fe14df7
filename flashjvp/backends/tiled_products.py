"""Products and sums of tiles in which an operand may be missing: None stands for zeros, and costs nothing."""

import torch
from torch import Tensor

Maybe = Tensor | None


def products_(out: Tensor, *pairs: tuple[Maybe, Maybe]) -> Tensor:
    """Writes sum a @ b.mT, over the pairs that lack no factor, to out [Z, R, K]; a [Z, R, D], b [Z, K, D].

    Row statistics are subtracted afterwards: added onto them, the products would be rounded to their magnitude D times.
    """
    present = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not present:
        return out.zero_()
    for i, (a, b) in enumerate(present):
        torch.baddbmm(out, a, b.mT, beta=min(i, 1), out=out)
    return out


def add_product_(acc: Maybe, a: Maybe, b: Maybe) -> None:
    """acc += a @ b, unless acc is not wanted or a factor is missing."""
    if acc is not None and a is not None and b is not None:
        acc.baddbmm_(a, b)


def dropped_(x: Tensor, R: Maybe) -> Tensor:
    """R * x, in place of x."""
    return x if R is None else x.mul_(R)


def finite(x: Tensor) -> Tensor:
    """x with 0 for -inf, the statistic of a row that has no key so far: its scores, all -inf, then give p = 0."""
    return x.masked_fill(x.isneginf(), 0.0)  # mutate: return x masked_fill


def scaled(x: Maybe, scale: float) -> Maybe:
    return None if x is None else x * scale


def take(x: Maybe, keys: slice) -> Maybe:
    return None if x is None else x[:, keys]


def row_product(a: Maybe, b: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if a is None or b is None else (a * b).sum(-1, keepdim=True)
