"""What the server of ranks.py loads before it forks. Nothing here may start a thread."""

from importlib import import_module

for name in (
    "torch._dynamo", "torch.distributed.tensor", "flashjvp.backends.reference", "flashjvp.backends.tiled",
    "flashjvp.distributed", "tests.flashjvp.distributed.works",
):  # fmt: skip
    import_module(name)
