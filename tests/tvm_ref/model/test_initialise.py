"""Initial weights and position embedding of the network."""

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from tvm_ref.model.dit import DiT
from tvm_ref.model.initialise import STD, position_embedding, spectral
from verify.budget.network_tolerance import SIGNIFICANCE, accumulated_rounding
from verify.oracles.network import tiny

ZERO = ("adaLN_modulation.1.weight", "final_layer.linear.weight")
TIME = ("t_embedder.mlp", "s_embedder.mlp", "guidance_embedder.mlp")


def spectral_norm(weight: torch.Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


@pytest.mark.parametrize("spectral_time_mlp", [True, False])
def test_every_layer_starts_as_described(spectral_time_mlp: bool) -> None:
    network = DiT(tiny(spectral_time_mlp=spectral_time_mlp))
    assert not network.pos_embed.requires_grad
    normal = []
    for name, weight in network.named_parameters():
        if name.endswith("bias") or name.endswith(ZERO):
            assert not weight.any(), name
        elif name.endswith("_norm.weight"):
            assert bool((weight == 1).all()), name
        elif name.startswith("y_embedder") or (name.startswith(TIME) and not spectral_time_mlp):
            normal.append(weight.detach().flatten())
        elif name != "pos_embed":
            # the norm of a float32 matrix, and its quotient, are off by a rounding for each of its elements at most
            rounding = accumulated_rounding(2 * weight.numel(), torch.float32)
            assert abs(spectral_norm(weight) - 1) <= rounding, name
    assert kstest((torch.cat(normal) / STD).double().numpy(), "norm").pvalue > SIGNIFICANCE


def test_a_fresh_network_is_zero_and_so_is_its_derivative() -> None:
    network = DiT(tiny())
    x, t, labels = torch.randn(2, 3, 6, 6), torch.rand(2), torch.tensor([0, 5])
    F, F_t = network(x, t, t, labels, t, (x, t, t))
    assert not F.any() and not F_t.any()


def test_spectral_weights_are_normal_up_to_their_scale() -> None:
    weight = spectral(nn.Linear(300, 200)).weight.detach().double().flatten()
    assert kstest((weight / weight.square().mean().sqrt()).numpy(), "norm").pvalue > SIGNIFICANCE
    assert not torch.equal(spectral(nn.Linear(4, 4)).weight, spectral(nn.Linear(4, 4)).weight)


def test_the_position_embedding_tells_column_and_row_in_sines_and_cosines() -> None:
    grid, width = 3, 8
    table = position_embedding(grid, width)
    assert table.shape == (1, 9, width) and table.dtype == torch.float32
    for row in range(grid):
        for column in range(grid):
            place = torch.tensor([column, column / 100, row, row / 100], dtype=torch.float64)
            expected = torch.cat([place[:2].sin(), place[:2].cos(), place[2:].sin(), place[2:].cos()])
            assert torch.equal(table[0, row * grid + column], expected.float())
