"""The implementations of the four operators: `triton` (kernels), `tiled` (plain PyTorch), `reference` (dense)."""
