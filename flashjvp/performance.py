"""The warning that a GPU could be faster: once a process for each reason."""

import sys
import warnings

from . import environment
from .errors import FlashJVPPerformanceWarning

_SAID: dict[str, bool] = environment.kept({})
_NOT_THE_USER = ("flashjvp", "torch")


def warn_once(reason: str) -> None:
    """Warns of `reason`, unless this process has. The warning names the user's line where there is one on the stack."""
    if reason in _SAID:
        return
    _SAID[reason] = True
    text = f"{reason} (flashjvp.explain tells what a call gets; this is said once)"
    warnings.warn(text, FlashJVPPerformanceWarning, stacklevel=_levels_to_the_user())


def _levels_to_the_user() -> int:
    """From `warn_once` out of flashjvp and PyTorch. A backward pass may run in a thread without a frame of the user."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    return level
