"""What `python -m flashjvp.check` is given in its tests."""

import torch
from torch import nn

Made = tuple[nn.Module, tuple[torch.Tensor], tuple[torch.Tensor]]
number = 1


def right() -> Made:
    x = torch.randn(3, 8)
    return nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)), (x,), (torch.randn_like(x),)


def wrong() -> Made:
    x = torch.randn(3, 8)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), (x,), (torch.randn_like(x),)


def of_other_shapes() -> Made:
    model, inputs, _ = right()
    return model, inputs, (torch.ones(2),)


def raises() -> Made:
    raise ValueError("no weights there")


def only_a_model() -> nn.Module:
    return nn.Linear(8, 8)


def of_many_lines() -> Made:
    raise ValueError("no weights\nthere")


class Stopped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def stopped() -> Made:
    _, inputs, tangents = right()
    return Stopped(), inputs, tangents
