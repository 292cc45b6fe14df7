"""Products of float32 tensors are rounded with the sum that they enter, and in no other place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from verify.emulator.contraction import Contracted

Sum = Callable[[Tensor, Tensor, Tensor], Tensor]
SUMS: dict[str, Sum] = {
    "x y + z": lambda x, y, z: x * y + z,
    "x y - z": lambda x, y, z: x * y - z,
    "z + x y": lambda x, y, z: z + x * y,
    "z - x y": lambda x, y, z: z - x * y,
}


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """z is the rounded product, so that x y - z is what rounding lost."""
    x, y = (torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return x, y, x * y


@pytest.mark.parametrize("name", SUMS)
def test_a_product_and_its_sum_are_rounded_once(name: str) -> None:
    x, y, z = numbers()
    expected = SUMS[name](x.double(), y.double(), z.double()).float()
    with Contracted():
        found = SUMS[name](x, y, z)
    assert torch.equal(found, expected)
    assert "-" not in name or (not torch.equal(found, SUMS[name](x, y, z)) and found.count_nonzero() > 300)


def test_a_number_as_factor_is_rounded_as_a_tensor_would_be() -> None:
    x, _, z = numbers()
    with Contracted():
        assert torch.equal(x * 0.1 + z, x * torch.tensor(0.1) + z)


def test_other_arithmetic_is_pytorchs() -> None:
    x, y, z = numbers()
    with Contracted():
        assert torch.equal(x * y, z)
        assert torch.equal((x * y).clone() - z, torch.zeros_like(z))  # a copy is no product
        assert torch.equal(x.half() * y.half() - y.half(), (x.half() * y.half()).clone() - y.half())
        assert torch.equal(x.double() * y.double() - z, (x.double() * y.double()).clone() - z)


def test_what_was_changed_in_place_counts_as_it_is() -> None:
    x, y, z = numbers()
    factor = x.clone()
    with Contracted():
        product, other = x * y, factor * y
        product += 1.0
        factor += 1.0
        assert torch.equal(product - z, (z + 1.0) - z)
        assert torch.equal(other - z, (x.double() * y.double() - z.double()).float())


def test_it_ends_with_its_block() -> None:
    x, y, z = numbers()
    with Contracted():
        pass
    assert torch.equal(x * y - z, torch.zeros_like(z))
