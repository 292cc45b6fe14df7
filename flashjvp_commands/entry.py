"""The entry points of the wheel: flashjvp-verify, flashjvp-bench, tvm-train and so on."""

import importlib
import signal
import sys
from pathlib import Path
from typing import NoReturn

ENTRY_POINTS = {
    "flashjvp-verify": "verify",
    "flashjvp-bench": "bench",
    **{
        f"tvm-{name}": f"tvm_ref.{name}"
        for name in ("train", "sample", "evaluate", "encode", "convert", "ema", "export", "experiments")
    },
}


def program(module: str) -> str:
    """How the user called the command in `module`: "flashjvp-bench sweep", or "python -m bench.sweep"."""
    called = Path(sys.argv[0]).name.removesuffix(".exe")
    package, _, rest = module.partition(".")
    if called in ENTRY_POINTS and ENTRY_POINTS[called] in (module, package):
        named = ENTRY_POINTS[called] == package and rest
        return f"{called} {rest.replace('_', '-')}" if named else called
    return f"python -m {module}"


def main() -> NoReturn:
    """Runs the command that this process is named after."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command sees to it
    from . import ending, extras

    sys.excepthook = ending.say_what_ended
    module = ENTRY_POINTS[Path(sys.argv[0]).name.removesuffix(".exe")]
    package = module in ("verify", "bench", "tvm_ref.experiments")
    if text := extras.advice(*(("train", "eval") if package else ("train",))):
        raise SystemExit(text)
    if package:
        sys.path.insert(0, str(extras.TOOLS))
        module += ".__main__"
    command = importlib.import_module(module)
    status = ending.run(command.main)
    leave = getattr(command, "leave", sys.exit)
    leave(status)
    raise AssertionError("a command does not end otherwise")
