"""The benchmarks by name: `python -m bench sweep ...`, also as `python -m bench.sweep ...`."""

import importlib
import sys
from collections.abc import Sequence

from flashjvp_commands import ending
from flashjvp_commands.entry import program

COMMANDS = {
    "sweep": "attention with its JVP, provider beside provider",
    "train-step": "time and memory of a training step",
    "train-quality": "sample quality and training time of presets",
    "interleaved": "calls beside what the device can do at the clocks it then has",
    "ring": "one sequence on several GPUs, under torchrun",
    "precision": 'errors of half types by size of scores, precision="high" too',
    "partial": "packed sequences, windows and block masks against dense calls",
    "host": "where the host's time of a call goes",
    "tune": "searches tiles for an architecture",
    "measure-card": "all that a card needs which nobody measured, into a folder",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        module = importlib.import_module(f"bench.{name.replace('-', '_')}")
        status: int = module.main(rest)
        return status
    listed = "\n".join(f"  {command:<14} {what}" for command, what in COMMANDS.items())
    text = f"usage: {program('bench')} COMMAND ...\n\n{listed}\n\nCOMMAND --help lists its options."
    if name in ("-h", "--help"):
        print(text)
        return ending.HELD
    print(f"{text}\nerror: expected a command, got {name!r}", file=sys.stderr)
    return ending.UNUSABLE


if __name__ == "__main__":
    sys.exit(ending.run(main))
