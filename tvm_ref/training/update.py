"""AdamW and both averages of the weights in one pass over memory, by one kernel for all parameters.

By themselves they read or write 13 numbers for each weight, in one pass 11: Loshchilov & Hutter, arXiv 1711.05101,
Algorithm 2, then average <- average + (1 - rate) (weight - average).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # weights of a program
WARPS = 8


@dataclass(frozen=True)
class Rates:
    """Constants of a step.

    lr, beta1, beta2, eps, weight_decay: AdamW's.
    step: of the optimizer, counted from 1.
    target_rate, average_rate: decays of the two averages.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    target_rate: float
    average_rate: float


class FusedUpdate:
    """Updates weights, their two moments and two averages of them.

    device: where they are. Each list has one contiguous float32 tensor for each parameter, on one device.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        moments: Sequence[Tensor],
        squares: Sequence[Tensor],
        targets: Sequence[Tensor],
        averages: Sequence[Tensor],
    ) -> None:
        self._kept = (weights, moments, squares, targets, averages)  # alive, since the kernel has their addresses
        self.device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        blocks = [-(-size // BLOCK) for size in sizes]
        self._count = sum(blocks)
        owner = [i for i, count in enumerate(blocks) for _ in range(count)]
        first = [place for count in blocks for place in range(count)]
        self._owner, self._first = (torch.tensor(x, dtype=torch.int32, device=self.device) for x in (owner, first))
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        rows = [[tensor.data_ptr() for tensor in tensors] for tensors in self._kept]
        self._aligned = _are_aligned(address for row in rows for address in row)
        self._addresses = torch.tensor(rows, dtype=torch.int64, device=self.device)

    def __call__(self, gradients: Sequence[Tensor], rates: Rates, finite: Tensor) -> None:
        """Makes one step. gradients: as the weights; finite: bool [], on the device: False changes nothing."""
        starts = [gradient.data_ptr() for gradient in gradients]
        addresses = torch.tensor(starts, dtype=torch.int64)
        if self.device.type == "cuda":
            addresses = addresses.pin_memory().to(self.device, non_blocking=True)
        adamw_and_averages_kernel[(self._count,)](
            self._addresses, addresses, self._sizes, self._owner, self._first, finite,
            rates.lr, 1 - rates.beta1, 1 - rates.beta2, rates.beta2, rates.eps, 1 - rates.lr * rates.weight_decay,
            1 - rates.beta1**rates.step, (1 - rates.beta2**rates.step) ** 0.5,
            1 - rates.target_rate, 1 - rates.average_rate,
            len(self._sizes), BLOCK=BLOCK, ALIGNED=self._aligned and _are_aligned(starts), num_warps=WARPS,
        )  # fmt: skip


def _are_aligned(addresses: Iterable[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


@triton.jit
def _tensor(addresses, parameter, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The start of a float32 tensor, from a list of addresses."""
    start = tl.load(addresses + parameter).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(start, 16) if ALIGNED else start


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    addresses, gradients, parameter, count, at, inside,
    lr, one_minus_beta1, one_minus_beta2, beta2, eps, keep, correction1, correction2, target_rate, average_rate,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The numbers at `at` of one parameter, those `inside`, or all where it is None."""
    weight_at = _tensor(addresses, parameter, ALIGNED) + at
    moment_at = _tensor(addresses, count + parameter, ALIGNED) + at
    square_at = _tensor(addresses, 2 * count + parameter, ALIGNED) + at
    target_at = _tensor(addresses, 3 * count + parameter, ALIGNED) + at
    average_at = _tensor(addresses, 4 * count + parameter, ALIGNED) + at
    gradient = tl.load(_tensor(gradients, parameter, ALIGNED) + at, mask=inside)
    weight = tl.load(weight_at, mask=inside)
    moment = tl.load(moment_at, mask=inside)
    square = tl.load(square_at, mask=inside)
    target = tl.load(target_at, mask=inside)
    average = tl.load(average_at, mask=inside)
    moment += (gradient - moment) * one_minus_beta1
    square = square * beta2 + gradient * gradient * one_minus_beta2
    root = tl.sqrt(square) / correction2 + eps
    weight = weight * keep - (lr / correction1) * (moment / root)
    tl.store(weight_at, weight, mask=inside)
    tl.store(moment_at, moment, mask=inside)
    tl.store(square_at, square, mask=inside)
    tl.store(target_at, target + (weight - target) * target_rate, mask=inside)
    tl.store(average_at, average + (weight - average) * average_rate, mask=inside)


@triton.jit(do_not_specialize=["lr", "keep", "correction1", "correction2"])
def adamw_and_averages_kernel(  # type: ignore[no-untyped-def]
    addresses, gradients, sizes, owner, first, finite,
    lr, one_minus_beta1, one_minus_beta2, beta2, eps, keep, correction1, correction2, target_rate, average_rate,
    count, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of one parameter. The rates of averages are what the weight counts; keep: 1 - lr weight_decay.

    ALIGNED: every tensor starts at a multiple of 16 bytes. Without that, and with a mask, memory is read by the number.
    """
    if tl.load(finite):
        program = tl.program_id(0)
        parameter = tl.load(owner + program)
        start = tl.load(first + program).to(tl.int64) * BLOCK
        at = start + tl.arange(0, BLOCK)
        size = tl.load(sizes + parameter)
        if start + BLOCK <= size:
            _update(
                addresses, gradients, parameter, count, at, None, lr, one_minus_beta1, one_minus_beta2, beta2, eps,
                keep, correction1, correction2, target_rate, average_rate, ALIGNED,
            )  # fmt: skip
        else:
            _update(
                addresses, gradients, parameter, count, at, at < size, lr, one_minus_beta1, one_minus_beta2, beta2, eps,
                keep, correction1, correction2, target_rate, average_rate, ALIGNED,
            )  # fmt: skip
