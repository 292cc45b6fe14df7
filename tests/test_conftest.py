"""Fresh memory is poisoned in every test: without this, the other tests could not see an unwritten result."""

import torch


def test_fresh_memory_holds_nan() -> None:
    x = torch.zeros(4, 3)
    fresh = (
        torch.empty(5),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (3, 1)),
        x.new_empty(7, dtype=torch.float64),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty(2, 3, dtype=torch.float16),
    )
    assert all(tensor.isnan().all() for tensor in fresh)
