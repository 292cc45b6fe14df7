"""`python -m flashjvp.check module:function`. Imported, this name stands for the function `flashjvp.check`."""

import sys
from typing import Any

from ._commands import ended
from .diagnosis import command
from .diagnosis.diagnose import check

if __name__ == "__main__":
    raise SystemExit(ended(command.main))

# A module may put another object in its place; else `import flashjvp.check` would hide the function of that name.
_modules: dict[str, Any] = sys.modules
_modules[__name__] = check
