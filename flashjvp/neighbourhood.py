"""Neighbourhoods of tokens on a line, in an image or in a volume, as block masks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
ROWS_AT_ONCE = 16


def neighbourhood(
    sizes: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    device: torch.device | str | None = None,
) -> "BlockMask":
    """The block mask by which each token of a grid sees its neighbours, for `attn_mask` of `attention`.

    Along each axis of `size` positions, query i sees the keys j = i (mod dilation) whose number p(j) = j // dilation is
    one of `kernel_size` numbers from s(i) on::

        s(i) = min(max(p(i) - kernel_size // 2, 0), count(i) - kernel_size)     count(i): how many j = i (mod dilation)

    so that at an edge the neighbourhood is moved inwards, and is as large as elsewhere. An even one has one key more
    before the query than after it. On a causal axis they are those from p(i) - kernel_size + 1 to p(i), and fewer at
    the first edge. A key is seen if it is along every axis. These are the neighbourhoods of NATTEN, with a stride of 1.

    Args:
        sizes: of the grid: (length,), (height, width) or (depth, height, width). Tokens are in row-major order: the
            last axis varies fastest. Sequences have prod(sizes) queries, and as many keys.
        kernel_size: how many keys a query sees along an axis; one number for all axes, or one for each.
        dilation: the step between these keys, likewise. kernel_size * dilation is at most the size of the axis.
        is_causal: True where a query sees no key after it along the axis, likewise.
        device: of the mask; that of the tensors of a call. None = PyTorch's default device.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask` for all batch entries and heads, in blocks of 128. Make one and
        keep it: attention prepares it at its first use.

    Derivatives:
        None: it has no numbers. `attention` with it has all of its derivatives.

    Raises:
        ArgumentTypeError: numbers that are not integers, flags that are not bools.
        ArgumentValueError: other than 1 to 3 sizes, another number of values than axes, a value out of range, a device
            that PyTorch does not know.

    Numerics:
        None.

    Source:
        Neighborhood attention (arXiv 2204.07143), dilated (arXiv 2209.15001), causal (arXiv 2403.04690).
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ArgumentTypeError(f"sizes: expected 1 to 3 integers, got an object of type {type(sizes).__name__}")
    if not 1 <= len(sizes) <= 3:
        raise ArgumentValueError(f"sizes: expected 1 to 3 integers, got {len(sizes)}")
    lengths = _numbers("sizes", sizes, len(sizes))
    kernels = _numbers("kernel_size", kernel_size, len(sizes))
    dilations = _numbers("dilation", dilation, len(sizes))
    flags = list(is_causal) if isinstance(is_causal, Sequence) else [is_causal] * len(sizes)
    for flag in flags:
        if not isinstance(flag, bool):
            raise ArgumentTypeError(f"is_causal: expected bools, got an object of type {type(flag).__name__}")
    if len(flags) != len(sizes):
        raise ArgumentValueError(f"is_causal: expected 1 or {len(sizes)} bools, got {len(flags)}")
    for length, kernel, step in zip(lengths, kernels, dilations, strict=True):
        if kernel * step > length:
            raise ArgumentValueError(
                f"kernel_size: expected kernel_size * dilation of at most the size {length}, got {kernel} * {step}"
            )
    where = _device(device)
    axes = zip(lengths, kernels, dilations, flags, strict=True)
    return _block_mask(lengths, [_along_axis(*axis).to(where) for axis in axes])


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentValueError(f"device: expected a device of PyTorch, got {device!r}") from error


def _numbers(name: str, value: Any, count: int) -> list[int]:
    """One positive integer for each axis."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentTypeError(f"{name}: expected integers, got an object of type {type(number).__name__}")
        if number < 1:
            raise ArgumentValueError(f"{name}: expected numbers of at least 1, got {number}")
    if len(numbers) != count:
        raise ArgumentValueError(f"{name}: expected 1 or {count} integers, got {len(numbers)}")
    return numbers


def _along_axis(length: int, kernel: int, step: int, is_causal: bool) -> Tensor:
    """Boolean [length, length]: whether a query position sees a key position."""
    position = torch.arange(length)
    rest, number = position % step, position // step
    count = (length - rest + step - 1) // step
    first = number - kernel + 1
    if not is_causal:
        first = torch.minimum((number - kernel // 2).clamp(min=0), count - kernel)
    inside = (number >= first[:, None]) & (number < first[:, None] + kernel)
    return inside & (rest == rest[:, None])


def _block_mask(sizes: Sequence[int], seen: Sequence[Tensor]) -> "BlockMask":
    """The lists of blocks, from positions that see each other along each axis."""
    from torch.nn.attention.flex_attention import BlockMask

    total, device = math.prod(sizes), seen[0].device
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]

    def mask_mod(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        found = [of[m // step % size, n // step % size] for of, step, size in zip(seen, steps, sizes, strict=True)]
        return torch.stack(found).all(0) if len(found) > 1 else found[0]

    blocks = -(-total // BLOCK)
    some, every = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    key = torch.arange(blocks * BLOCK, device=device).clamp(max=total - 1)
    for first, query in enumerate(key[:, None].split(ROWS_AT_ONCE * BLOCK)):
        tiles = mask_mod(query, query, query, key).view(-1, BLOCK, blocks, BLOCK)
        rows = slice(first * ROWS_AT_ONCE, first * ROWS_AT_ONCE + len(tiles))
        some[rows] = tiles.any(3).any(1)
        every[rows] = tiles.all(3).all(1)
    lists = [_list_of(blocks_seen) for blocks_seen in (some & ~every, every)]
    return BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(total, total)
    )


def _list_of(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row there are, and which: [1, 1, rows] and [1, 1, rows, columns]."""
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[None, None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]
