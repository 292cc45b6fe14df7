"""The commands: `python -m verify` verifies this installation. With a word after it, it does something else:

- model: whole networks and their training losses;
- published: tvm_ref gives the numbers of the published code;
- faults: mutation tests, which show that the checks catch planted bugs;
- codegen: what the kernels compile to, without a GPU.
"""

import importlib
import sys
from collections.abc import Sequence

from flashjvp_commands import ending

COMMANDS = {
    "model": ".model.command",
    "published": ".model.published",
    "faults": ".faults.command",
    "codegen": ".codegen.command",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = bool(arguments) and arguments[0] in COMMANDS
    module = importlib.import_module(COMMANDS[arguments[0]] if named else ".run.command", "verify")
    status: int = module.main(arguments[1:] if named else arguments)
    return status


if __name__ == "__main__":
    sys.exit(ending.run(main))
