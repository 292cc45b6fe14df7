"""`python -m flashjvp`: the support table, and what this machine gets."""

import textwrap

import torch

from . import _commands, environment, support
from .backends import select

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDTHS = (16, 32, 64, 80, 96, 128, 256)  # head dims as tensor cores have them padded


def main(arguments: list[str] | None = None) -> int:
    """Prints, and returns 0."""
    _commands.Parser(
        prog="python -m flashjvp",
        description="Prints which releases of torch, Triton and Python flashjvp was tried with, the devices of this "
        "machine, and which backend and kernels serve each dtype there. flashjvp.explain(q, k, v, ...) says the same "
        "of one call.",
    ).parse_args(arguments)
    found = support.installed()
    row = support.row_of(found)
    print(f"Tried together (as PyPI has them), with flashjvp {found.flashjvp}:\n")
    print(support.text(row))
    triton = f"Triton {found.triton}" if found.triton else "no Triton"
    print(f"\nHere: torch {found.torch}, {triton}, Python {found.python}")
    print(*_judged(found, row), sep="\n")
    print(f"\nThe kernels, by GPU:\n\n{support.text_of_cards()}")
    for device in _devices():
        print(f"\n{_described(device)}")
        print(*(line for dtype in DTYPES for line in _gets(device, dtype)), sep="\n")
    return 0


def _judged(found: support.Versions, row: support.Row | None) -> list[str]:
    """What the table says of these versions."""
    if row is None:
        return textwrap.wrap("This pair of torch and Triton is not in the table: nobody has tried it.", 80)
    if not found.python.startswith(row.python + "."):
        return [f"The pair was tried with Python {row.python}."]
    return ["The pair is marked in the table."]


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [*(torch.device("cuda", i) for i in gpus), torch.device("cpu")]


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    major, minor = environment.capability(device.index)
    return f"{device}: {environment.device_name(device)}, compute capability {major}.{minor}"


def _gets(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Which backend serves a dtype on a device, with which kernels, and why with no faster ones."""
    start = f"  {str(dtype).removeprefix('torch.'):<10}"
    words = _kernels(device, dtype) if select.choose(device, dtype) == "triton" else _plain(device, dtype)
    return textwrap.wrap(words, 80, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


def _plain(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "tiled: plain PyTorch"
    return f"tiled: plain PyTorch, since triton {select.obstacle('triton', device, dtype)}"


def _kernels(device: torch.device, dtype: torch.dtype) -> str:
    select.resolve("triton", device, dtype)
    from .kernels.launch import schedule

    precision = schedule.input_precision(dtype, device)
    why_not = {width: schedule.why_not_pipelines(device, precision, width) for width in WIDTHS}
    fast = [str(width) for width, reason in why_not.items() if reason is None]
    if fast:
        return f"triton: warp-specialised kernels for head dims padded to {', '.join(fast)}, else portable ones"
    return f"triton: portable kernels, since {why_not[64]}"


if __name__ == "__main__":
    raise SystemExit(_commands.ended(main))
