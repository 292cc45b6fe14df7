"""Packed sequences, windows and block masks are replayed, and a call like an earlier one goes there at once."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashjvp
from flashjvp.backends import partial, rows_first
from flashjvp.dispatch import fast_path
from tests.flashjvp.kernels.test_hopper import interpreted
from verify.emulator.compiled import compiling

ROWS, HEADS, D = 40, 2, 16
CU = [torch.tensor(x, dtype=torch.int32) for x in ([0, 13, 40], [0, 25, 40], [0, 20, 40], [0, 7, 40])]
BLOCKS = [create_block_mask(f, None, None, ROWS, ROWS, device="cpu") for f in (
    lambda b, h, i, j: j <= i, lambda b, h, i, j: j >= i
)]  # fmt: skip


def packed(x: list[Tensor], turn: int) -> Any:
    cu = CU[2 * turn : 2 * turn + 2]
    if len(x) == 3:
        return (flashjvp.attention_varlen(*x, *cu, backend="triton"),)
    return flashjvp.attention_varlen_jvp(*x[:3], *cu, None, None, *x[3:], backend="triton")


def dense(x: list[Tensor], **options: Any) -> Any:
    if len(x) == 3:
        return (flashjvp.attention(*x, backend="triton", **options),)
    return flashjvp.attention_jvp(*x, backend="triton", **options)


CALLS: dict[str, Callable[[list[Tensor], int], Any]] = {
    "packed": packed,
    "window": lambda x, _: dense(x, window=(5, 9)),
    "causal window": lambda x, _: dense(x, window=(5, None), is_causal=True),
    "block mask": lambda x, turn: dense(x, attn_mask=BLOCKS[turn]),
}


def results(kind: str, count: int, turn: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(turn)
    shape = (ROWS, HEADS, D) if kind == "packed" else (1, HEADS, ROWS, D)
    x = [torch.randn(shape, generator=generator).half().requires_grad_() for _ in range(count)]
    outputs = CALLS[kind](x, turn)
    return [*outputs, *torch.autograd.grad(outputs, x, [o.detach().sin() for o in outputs])]


@interpreted
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("kind", CALLS)
def test_replayed_at_once(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and blocks are those of the call; neither the composed backend is asked again, nor is a view made."""
    fast_path.forget()
    monkeypatch.setattr(sys.modules["flashjvp.varlen"], "_is_readable", lambda lengths: False)
    first = [results(kind, count, turn) for turn in (0, 1)]
    assert not all(map(torch.equal, *first))
    with compiling() as replays:
        for turn in (0, 1, 0, 1, 0):
            results(kind, count, turn)
        replays.clear()
        monkeypatch.setattr(partial._Partial, "ends_in", None)
        monkeypatch.setattr(rows_first, "_heads_first", None)
        for turn in (0, 1):
            assert all(map(torch.equal, results(kind, count, turn), first[turn]))
        assert len(replays) == 4
    fast_path.forget()
