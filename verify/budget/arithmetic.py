"""How numbers are rounded in a type: the relative variances of rounding, which propagation.py follows to results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases.inputs import Inputs

MEAN_SQUARE = 0.541
UNIT_OF_P = 2.0**9  # what the backward gains by per-tensor scaling on the subnormals of float16
SUBNORMAL = 2.0**-24  # of float16


def are_factors_rounded(inputs: Inputs) -> bool:
    """Whether products may round float32 factors, to TF32 or no more coarsely: as PyTorch's precision setting says."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return allowed and inputs.q.dtype == torch.float32 and inputs.q.device.type == "cuda"


@dataclass(frozen=True)
class Arithmetic:
    """Relative variances of rounding in float32 (`eps`), of tiles (`tile`) and of inputs that are factors (`factor`),
    the least variance of a tile in its unit (`tiny`), which is `lost` times as large in the forward, and the smallest
    normal float32 (float64 for float64 inputs)."""

    dtype: torch.dtype
    eps: float
    tile: float
    tiny: float
    smallest: float
    factor: float = 0.0
    lost: float = 1.0

    @classmethod
    def of(cls, dtype: torch.dtype, are_factors_rounded: bool) -> "Arithmetic":
        if are_factors_rounded:
            exact, half = cls.of(dtype, False), cls.of(torch.float16, False)
            tiny = half.tiny / UNIT_OF_P**2 + exact.smallest**2
            return cls(dtype, exact.eps, half.tile, tiny, exact.smallest, half.tile, UNIT_OF_P)
        info = torch.finfo(dtype)
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        # subnormals of the type are absolute; float32 subnormals may be flushed to zero
        tiny = (info.smallest_normal * info.eps) ** 2 / 12 + wide.smallest_normal**2
        doubled = 2.0 if dtype == torch.float64 else 1.0  # the exact results have the same errors
        eps, tile = doubled * (wide.eps / 2) ** 2 / 3, doubled * (info.eps / 2) ** 2 / 3 * MEAN_SQUARE
        return cls(dtype, eps, tile, tiny, wide.smallest_normal)

    def tiles(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Variance of x after rounding x / scale to the input type."""
        return torch.where(x != 0, self.tile * x.square() + self.tiny * (scale * torch.ones_like(x)).square(), 0.0)

    def rounded(self, x: Tensor) -> Tensor:
        """x as a product takes it."""
        return to_11_bits(x) if self.factor > 0 else x.to(self.dtype)

    def rounded_product(self, x: Tensor, y: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """Variance of x @ y after rounding x. Equal elements (constant keys) round alike: x's own errors count."""
        own = x - self.rounded(x)
        return torch.maximum(self.tiles(x, unit) @ y.square(), own.square() @ y.square())

    def of_input(self, x: Tensor, unit: float) -> Tensor:
        """Variance of an input after rounding it as a factor of products, in a unit of its own."""
        if self.factor == 0:
            return torch.zeros_like(x)
        return torch.where(x != 0, self.factor * x.square() + (SUBNORMAL * unit) ** 2 / 12, 0.0)

    def stored(self, x: Tensor) -> Tensor:
        """Variance of rounding a result x to the input type; equal elements round alike, so x's own errors count."""
        info = torch.finfo(self.dtype)
        spacing = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1)
        spacing = spacing.clamp(min=info.smallest_normal * info.eps)
        variance = torch.where(x != 0, spacing.square() / (6 if self.dtype == torch.float64 else 12), 0.0)
        own = (x - x.to(self.dtype)).square().sum() / variance.sum()
        return variance * own.nan_to_num(1.0).clamp(min=1.0)


def to_11_bits(x: Tensor) -> Tensor:
    """x rounded to 11 significant bits, away from zero where two are as near: as GPUs round to TF32."""
    digits, exponent = torch.frexp(x)
    return torch.ldexp((digits.abs() * 2**11 + 0.5).floor() * digits.sign() / 2**11, exponent)


def longest_row(x: Tensor) -> float:
    """The greatest length of a row."""
    return x.norm(dim=-1).max().item()


def sum_variance(x: Tensor, y: Tensor) -> Tensor:
    """Variance, in eps^2, of x @ y: of partial sums L/2 sum (x y)^2 + L/3 (x @ y)^2, and of each product."""
    length = x.shape[-1]
    return (1 + length / 2) * (x.square() @ y.square()) + length / 3 * (x @ y).square()


def centered(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum over n of weight[m, n] (x[n, d] - y[m, d])^2."""
    squares = weight @ x.square() - 2 * y * (weight @ x) + y.square() * weight.sum(-1, keepdim=True)
    return squares.clamp(min=0)
