"""EMA: exponential moving averages of weights."""

import torch
from torch import nn

from tvm_ref.model import ema


def test_an_average_is_the_sum_of_the_past_with_falling_weights() -> None:
    network = nn.Linear(3, 2, dtype=torch.float64)
    average = ema.copy_of(network)
    assert not any(p.requires_grad for p in average.parameters())
    update = ema.Average(average, network, rate=0.75)
    past = [network.weight.detach().clone()]
    for _ in range(4):
        with torch.no_grad():
            network.weight.normal_()
        update.update()
        past.append(network.weight.detach().clone())
    weights = [0.75**4, *(0.25 * 0.75**k for k in (3, 2, 1, 0))]
    expected = sum(weight * value for weight, value in zip(weights, past, strict=True))
    torch.testing.assert_close(average.weight, expected)
    assert torch.equal(average.bias, network.bias)


def test_a_copy_does_not_share_weights() -> None:
    network = nn.Linear(3, 2)
    average = ema.copy_of(network)
    before = average.weight.clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    assert torch.equal(average.weight, before)
