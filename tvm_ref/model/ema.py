"""EMA: exponential moving averages of a network's weights."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Network = TypeVar("Network", bound=nn.Module)


def copy_of(network: Network) -> Network:
    """Copies `network` to start an average from: same values, no gradients."""
    return copy.deepcopy(network).requires_grad_(False)


class Average:
    """Updates average <- rate * average + (1 - rate) * network for every weight, in place and in the weight's dtype.

    average, network: modules with the same parameters in the same order. If they are sharded, both are sharded alike,
    and each process averages its own shards. rate: the decay, in [0, 1).
    """

    def __init__(self, average: nn.Module, network: nn.Module, rate: float) -> None:
        self._average, self._network, self._rate = local_weights(average), local_weights(network), rate

    @torch.no_grad()
    def update(self) -> None:
        """Makes one step of the average."""
        torch._foreach_lerp_(self._average, self._network, 1 - self._rate)


def local_weights(module: nn.Module) -> list[torch.Tensor]:
    """The weights of a module, of sharded ones the part of this process. They share memory with the module."""
    return [local(p) for p in module.parameters()]


def local(x: torch.Tensor) -> torch.Tensor:
    """A tensor without its graph, of a sharded one the part of this process. It shares memory with it."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()
