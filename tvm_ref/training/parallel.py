"""Distributed training and memory: process groups, DDP, FSDP, activation checkpointing and compilation.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them, a run is a single process. The backend is gloo for CPU
tensors and NCCL for GPU tensors.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..model.dit import DiT
from .config import ConfigError

T = TypeVar("T")

PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten._scaled_mm.default: 0, torch.ops.aten.addmm.default: 1}
"""What linear layers are to the dispatcher, and the position of the first factor among the arguments of each."""
WIDE = 3  # a product of more columns than this times the numbers that are summed for each is a wide one

_GROUPS: list[Any] = []
"""Every process group, kept alive until the process ends, to avoid a deadlock. Otherwise a DDP module that outlives
training (in an exception's traceback, say) may own a group last. Its destructor then waits for gloo's threads while it
holds the GIL, and those threads may wait for the GIL to free a tensor. When freed from here, the GIL is released first.
"""


@dataclass(frozen=True)
class World:
    """The processes of a run: the rank of this process, the world size, and the device of this process.

    group: the process group that they talk in; None: the default one.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files that only one process may write."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Gathers `value` from every process, ordered by rank. All processes must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums `values` over all processes, in place (all-reduce)."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def in_host_memory(self) -> "World":
        """The same processes in a group of their own for tensors of the CPU, so that a thread may use it meanwhile.

        All processes must call it, in the same order.
        """
        cpu = torch.device("cpu")
        if self.size == 1:
            return World(self.rank, self.size, cpu)
        group = dist.new_group(backend="gloo")
        _GROUPS.append(group)
        return World(self.rank, self.size, cpu, group)


@contextlib.contextmanager
def world(device: Literal["auto", "cpu", "cuda"]) -> Iterator[World]:
    """Joins the process group of the processes that torchrun started, and leaves it at the end.

    Raises ConfigError if there is no GPU for this process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        count = torch.cuda.device_count()
        if size == 1 and count == 0:
            raise ConfigError("device: cuda is not there: torch finds 0 GPUs")
        if local >= count:
            raise ConfigError(
                f"process {local} of this machine (counted from 0) needs a GPU of its own, but there are {count}: "
                "start at most that many (torchrun --nproc-per-node), or use the CPU (--run.device cpu or --device cpu)"
            )
        torch.cuda.set_device(local)
    this = World(rank, size, torch.device(kind, local) if kind == "cuda" else torch.device(kind))
    if size == 1:
        yield this
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    _GROUPS.append(dist.group.WORLD)
    try:
        yield this
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def world_on(name: str) -> Iterator[World]:
    """`world`, for a device by its name: cpu, cuda, cuda:1. With several processes, cuda is a GPU for each of them.

    Raises ConfigError, also for several processes on one GPU.
    """
    device = torch.device(name)
    with world("cuda" if device.type == "cuda" else "cpu") as this:
        if this.size > 1 and device.index is not None:
            raise ConfigError(f"device: expected cuda, a GPU for each of {this.size} processes, got {name}")
        yield this if this.size > 1 else replace(this, device=device)


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status.

    With several processes, it skips the interpreter's teardown. There gloo sometimes aborted a process ("terminate
    called without an active exception") after all its work was done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def recompute(blocks: nn.ModuleList, kind: Literal["none", "full", "selective"]) -> None:
    """Applies activation checkpointing to every block, which then keeps its inputs for the backward pass.

    selective: also results of attention and of products, which cost most to compute again for their bytes. In a call
    with tangents, whose results are twice as many, those of wide products are left out (fc1 of the MLP).
    """
    if kind == "none":
        return
    for index, block in enumerate(blocks):
        # Blocks use no random numbers, so there is no random state to save.
        how = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        blocks[index] = checkpoint_wrapper(block, checkpoint_fn=how if kind == "full" else partial(_selectively, how))


def _selectively(how: Callable[..., Any], block: nn.Module, x: Any, c: Any, *rest: Any) -> Any:
    """Calls a block (`DiTBlock.forward`), which keeps what `recompute` says."""
    with_tangents = any(tangent is not None for tangent in rest[:2])
    keep = _keep_unless_wide if with_tangents else _keep
    return how(block, x, c, *rest, context_fn=partial(create_selective_checkpoint_contexts, keep))


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = operator.namespace == "flashjvp" or operator in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_unless_wide(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in PRODUCTS:
        x, weight = args[PRODUCTS[operator] :][:2]
        if weight.shape[1] > WIDE * x.shape[1]:
            return CheckpointPolicy.PREFER_RECOMPUTE
    return _keep(context, operator, *args, **kwargs)


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compiles every block by itself; equal blocks share the compiled code.

    Inductor's fusion of reductions over different dims ("mix order") is turned off: it may drop gradients of modulation
    vectors that are slices of one tensor (PyTorch 2.10 to 2.13; pytorch/pytorch#193061).
    """
    from .inductor import wait_before_reading_back  # takes seconds to import; only compiled runs need it

    wait_before_reading_back()
    for block in blocks:
        block.compile(dynamic=False, options={"triton.mix_order_reduction": False})


def shard(blocks: nn.ModuleList, root: nn.Module, this: World) -> None:
    """Shards the weights of every block, and all other weights of `root`, over all processes (FSDP2)."""
    mesh = init_device_mesh(this.device.type, (this.size,))
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def share_tokens(networks: Sequence[DiT], count: int, this: World) -> None:
    """Divides the tokens of an image over `count` successive processes, which form a ring in attention.

    The losses of these processes are the same, and their gradients are parts of that of the sum of all processes'
    losses. So averages over all processes, by DDP or FSDP, are the gradient of the mean loss, as they are without this.
    """
    if count == 1:
        return
    from flashjvp.distributed import Sharding  # what it imports is not needed otherwise

    mesh = init_device_mesh(this.device.type, (this.size // count, count), mesh_dim_names=("data", "context"))
    _GROUPS.append(mesh["context"].get_group())
    for network in networks:
        network.share_tokens(Sharding(network.config.grid**2, ring=_GROUPS[-1]))


def replicate(step: nn.Module, this: World) -> nn.Module:
    """Wraps `step` in DDP, which averages gradients over all processes in the backward pass."""
    if this.size == 1:
        return step
    return DistributedDataParallel(step, gradient_as_bucket_view=True)


@torch.no_grad()
def same_start(network: nn.Module, this: World) -> None:
    """Broadcasts the weights of rank 0 to every process."""
    if this.size > 1:
        for parameter in network.parameters():
            dist.broadcast(parameter, 0)
