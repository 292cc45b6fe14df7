"""The entry points of the wheel: flashjvp-verify, flashjvp-bench, tvm-train and so on.

verify, bench and reports lie in this folder when installed, and beside it in a checkout. Only a process that runs one
of these commands sees them under their short names, so they collide with no other package of site-packages.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
TOOLS = HERE if (HERE / "verify").is_dir() else HERE.parent
ENTRY_POINTS = {
    "flashjvp-verify": "verify",
    "flashjvp-bench": "bench",
    **{f"tvm-{name}": f"tvm_ref.{name}" for name in ("train", "sample", "evaluate", "encode", "convert", "export")},
}


def program(module: str) -> str:
    """How the user called the command in `module`: "flashjvp-verify", or "python -m verify"."""
    called = Path(sys.argv[0]).name.removesuffix(".exe")
    return called if ENTRY_POINTS.get(called) == module else f"python -m {module}"


def main() -> NoReturn:
    """Runs the command that this process is named after."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command sees to it
    from . import ending, extras

    module = ENTRY_POINTS[Path(sys.argv[0]).name.removesuffix(".exe")]
    tool = module in ("verify", "bench")
    if text := extras.advice(*(("train", "eval") if tool else ("train",))):
        raise SystemExit(text)
    if tool:
        sys.path.insert(0, str(TOOLS))
        module += ".__main__"
    command = importlib.import_module(module)
    status = ending.run(getattr(command, "cli", command.main))
    leave = getattr(command, "leave", sys.exit)
    leave(status)
    raise AssertionError("a command does not end otherwise")
