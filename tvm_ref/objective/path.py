"""The straight path between data and noise, x_t = (1 - t) data + t noise, and its velocity."""

from torch import Tensor


def point(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t x1 for data x0 and noise x1 [B, C, H, W] and times t [B] in [0, 1], all of one dtype.

    t = 1 is noise. Differentiable in all arguments. Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003.
    """
    t = per_image(t)
    return (1 - t) * x0 + t * x1


def velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """v = d x_t / dt = x1 - x0, in units of the data per unit of time."""
    return x1 - x0


def per_image(scalar: Tensor) -> Tensor:
    """Reshapes one scalar per image, [B], to [B, 1, 1, 1]."""
    return scalar[:, None, None, None]
