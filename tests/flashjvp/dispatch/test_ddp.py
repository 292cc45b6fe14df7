"""DistributedDataParallel over two gloo processes: gradients through the JVP are the mean of both shards'."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.flashjvp.dispatch.ddp_rank import Block, batch, loss

ROOT = Path(__file__).parents[3]


def test_gradients_of_two_ranks_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    commands = [
        [sys.executable, "-m", "tests.flashjvp.dispatch.ddp_rank", str(rank), str(tmp_path)] for rank in range(2)
    ]
    ranks = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        _, errors = rank.communicate()
        assert rank.returncode == 0, errors[-3000:]
    whole = Block()
    loss(whole, *batch()).backward()
    for rank in range(2):
        shard = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(shard, [p.grad for p in whole.parameters()])
