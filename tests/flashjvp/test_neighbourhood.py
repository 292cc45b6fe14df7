"""neighbourhood: the keys that a query sees are those of its definition, counted one by one."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from flashjvp import ArgumentTypeError, ArgumentValueError, FlashJVPError, attention, neighbourhood
from tests.flashjvp.forms import normal


def along(query: int, length: int, kernel: int, step: int, is_causal: bool) -> list[int]:
    """The keys of a query along an axis."""
    alike = list(range(query % step, length, step))
    place = alike.index(query)
    if is_causal:
        return alike[max(0, place - kernel + 1) : place + 1]
    start = min(max(place - kernel // 2, 0), len(alike) - kernel)
    return alike[start : start + kernel]


def expected(sizes: Sequence[int], kernel: Sequence[int], step: Sequence[int], causal: Sequence[bool]) -> torch.Tensor:
    tokens = list(itertools.product(*map(range, sizes)))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for seen in itertools.product(*map(along, query, sizes, kernel, step, causal)):
            mask[i, tokens.index(seen)] = True
    return mask


@pytest.mark.parametrize(
    ("sizes", "kernel", "step", "causal"),
    [
        ((50,), (7,), (3,), (False,)),
        ((150,), (4,), (1,), (True,)),
        ((12, 13), (3, 4), (2, 1), (False, True)),
        ((4, 5, 7), (3, 2, 3), (1, 2, 2), (True, False, False)),
    ],
)
def test_as_counted(sizes: Any, kernel: Any, step: Any, causal: Any) -> None:
    mask = neighbourhood(sizes, kernel, step, causal)
    keep = expected(sizes, kernel, step, causal)
    total = len(keep)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, total, total, device="cpu")[0, 0], keep)
    q, k, v = (normal(1, 2, total, 4, seed=seed) for seed in range(3))
    assert torch.allclose(attention(q, k, v, mask), attention(q, k, v, keep))


def test_one_number_for_all_axes_and_blocks_that_are_listed() -> None:
    """Of 32 x 32 tokens with a neighbourhood of 5 x 5: 128 tokens are 4 rows, which see 2 more on each side."""
    mask = neighbourhood((32, 32), 5)
    assert mask.kv_num_blocks[0, 0].tolist() == [2, 3, 3, 3, 3, 3, 3, 2]
    assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.sum() == 0
    whole = neighbourhood((16, 16), 16)
    assert whole.full_kv_num_blocks is not None and whole.full_kv_num_blocks.tolist() == [[[2, 2]]]


BAD: list[tuple[dict[str, Any], type[FlashJVPError], str]] = [
    ({"sizes": 8}, ArgumentTypeError, "sizes: expected 1 to 3 integers"),
    ({"sizes": ()}, ArgumentValueError, "sizes: expected 1 to 3 integers, got 0"),
    ({"sizes": (2, 2, 2, 2)}, ArgumentValueError, "sizes: expected 1 to 3 integers, got 4"),
    ({"sizes": (8, 2.0)}, ArgumentTypeError, "sizes: expected integers"),
    ({"kernel_size": 0}, ArgumentValueError, "kernel_size: expected numbers of at least 1"),
    ({"kernel_size": (3, 3, 3)}, ArgumentValueError, "kernel_size: expected 1 or 2 integers, got 3"),
    ({"dilation": 3}, ArgumentValueError, "kernel_size: expected kernel_size * dilation of at most"),
    ({"dilation": True}, ArgumentTypeError, "dilation: expected integers"),
    ({"is_causal": 1}, ArgumentTypeError, "is_causal: expected bools"),
    ({"is_causal": (True,)}, ArgumentValueError, "is_causal: expected 1 or 2 bools, got 1"),
    ({"device": "no such"}, ArgumentValueError, "device: expected a device of PyTorch, got 'no such'"),
    ({"device": 0.5}, ArgumentValueError, "device: expected a device of PyTorch, got 0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[FlashJVPError], message: str) -> None:
    good: dict[str, Any] = {"sizes": (8, 8), "kernel_size": 3}
    with pytest.raises(error) as caught:
        neighbourhood(**{**good, **change})
    assert type(caught.value) is error and str(caught.value).startswith(message)
