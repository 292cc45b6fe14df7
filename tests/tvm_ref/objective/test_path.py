"""The path between data and noise, and its velocity."""

import torch

from tvm_ref.objective import path


def test_the_path_goes_from_data_to_noise_and_moves_at_its_velocity() -> None:
    x0, x1 = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(path.point(x0, x1, torch.zeros(4, dtype=torch.float64)), x0)
    assert torch.equal(path.point(x0, x1, torch.ones(4, dtype=torch.float64)), x1)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)  # each image has its own time
    middle = path.point(x0, x1, t)
    for i, time in enumerate(t):
        assert torch.equal(middle[i], (1 - time) * x0[i] + time * x1[i])
    _, derivative = torch.func.jvp(lambda time: path.point(x0, x1, time), (t,), (torch.ones_like(t),))
    assert torch.equal(derivative, path.velocity(x0, x1))
