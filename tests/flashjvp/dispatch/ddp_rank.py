"""One rank of the DistributedDataParallel test, run in a process of its own by test_ddp.py.

Usage: python -m tests.flashjvp.dispatch.ddp_rank RANK FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import jvp
from torch.nn.parallel import DistributedDataParallel

import flashjvp


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(6, 18, dtype=torch.float64)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return flashjvp.attention(q, k, v)

    def forward(self, x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        o, o_t = jvp(self.attend, (x,), (x_t,))
        return o, o_t


def batch() -> Tensor:
    return torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(model: torch.nn.Module, x: Tensor, x_t: Tensor) -> Tensor:
    o, o_t = model(x, x_t)
    return (o.sin() + o_t.cos()).mean()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(Block())
    x, x_t = batch()
    loss(model, x[rank : rank + 1], x_t[rank : rank + 1]).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
