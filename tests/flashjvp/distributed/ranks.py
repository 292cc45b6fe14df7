"""Processes of a gloo group that run functions for the tests: started once, since each takes seconds to load PyTorch.

They are forked from a server that has the modules loaded.
"""

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.flashjvp.distributed.loaded"])
SIZE = 4
PATIENCE_SECONDS = 240


class Ranks:
    """Processes that run a function of (group, *arguments), in groups of 2, 3 or 4."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._ranks = []
        for rank in range(SIZE):
            here, there = CHILDREN.Pipe()
            process = CHILDREN.Process(target=_serve, args=(rank, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What work(group, *arguments) returns on each rank of a group of this size."""
        taking_part = self._ranks[:size]
        for _, connection in taking_part:
            connection.send((size, work, arguments))
        answers = []
        for process, connection in taking_part:
            if not connection.poll(PATIENCE_SECONDS):
                self.close()
                raise TimeoutError(f"rank {process.name} hangs in {work.__name__}{arguments}")
            answers.append(connection.recv())
        failed = [words for words, _ in answers if words]
        assert not failed, failed[0]
        return [torch.load(io.BytesIO(content), weights_only=False) for _, content in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process, connection in self._ranks:
            with suppress(OSError):
                connection.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    store = dist.FileStore(str(Path(folder) / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(range(size)) for size in (2, 3)} | {SIZE: dist.group.WORLD}
    while (job := connection.recv()) is not None:
        size, work, arguments = job
        try:
            content = io.BytesIO()
            torch.save(work(groups[size], *arguments), content)
            connection.send(("", content.getvalue()))
        except Exception:
            connection.send((traceback.format_exc(), b""))
    dist.destroy_process_group()
