"""What the processes of a group send one another: tensors in one flat buffer for each receiver.

`Group` is what ring.py and ulysses.py know of torch.distributed. Verification puts threads in the place of processes
there.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]
Wait = Callable[[], None]
_ALIGNMENT = 128
"""Bytes. Kernels read tensors from where rows may be loaded 16 bytes at a time, or by TMA."""


class Group:
    """The processes of a torch.distributed group, with their ranks in it. Every one makes the same calls."""

    def __init__(self, processes: dist.ProcessGroup) -> None:
        self._processes = processes
        self.rank, self.size = dist.get_rank(processes), dist.get_world_size(processes)
        self.name: str = processes.group_name

    def shift(self, sent: Tensor, received: Tensor, by: int) -> Wait:
        """Starts to send a buffer `by` ranks on, and to receive one from as many ranks before. Returns what waits.

        Waiting stops a GPU's stream, not the host.
        """
        to, source = ((self.rank + step) % self.size for step in (by, -by))
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, sent, group=self._processes, group_peer=to),
            dist.P2POp(dist.irecv, received, group=self._processes, group_peer=source),
        ])  # fmt: skip

        return functools.partial(_wait, works, sent)

    def swap(self, sent: Tensor, sent_sizes: list[int], received: Tensor, received_sizes: list[int]) -> None:
        """Sends each rank its part of a buffer, and receives one part from each (all-to-all)."""
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self._processes)


def _wait(works: Sequence[dist.Work], sent: Tensor) -> None:
    """Waits for messages. What is sent stays in memory until then, since this function has it."""
    for work in works:
        work.wait()


def packed(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Copies tensors into a buffer of the dtype of `like`, from which `unpacked` takes them."""
    starts, end = _places([x.shape for x in tensors], like.dtype)
    buffer = like.new_empty(end)
    for start, x in zip(starts, tensors, strict=True):
        buffer[start : start + x.numel()].view(x.shape).copy_(x)
    return buffer


def buffer(shapes: Sequence[Shape], like: Tensor) -> Tensor:
    """An unwritten buffer for tensors of these shapes."""
    return like.new_empty(_places(shapes, like.dtype)[1])


def unpacked(buffer: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Views of the tensors in a buffer."""
    starts, _ = _places(shapes, buffer.dtype)
    return [
        buffer[start : start + math.prod(shape)].view(shape) for start, shape in zip(starts, shapes, strict=True)
    ]  # fmt: skip


def swap(
    group: Group, parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], like: Tensor
) -> list[list[Tensor]]:
    """Sends parts[r] to each rank r; returns what each rank sent, of shapes[r]. All tensors have one dtype."""
    sent = [packed(part, like) for part in parts]
    ends = [_places(of_rank, like.dtype)[1] for of_rank in shapes]
    received = like.new_empty(sum(ends))
    group.swap(torch.cat(sent), [len(x) for x in sent], received, ends)
    return [unpacked(x, of_rank) for x, of_rank in zip(received.split(ends), shapes, strict=True)]


def _places(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[list[int], int]:
    """Where each tensor starts in a buffer, in elements, and where the buffer ends: there is no empty message."""
    step = _ALIGNMENT // dtype.itemsize
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) // step) * step
    return starts, max(end, step)
