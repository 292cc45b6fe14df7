"""Which context of `replaced` a call is in: the innermost one of its thread, else what `install` put in place.

A thread's contexts are an ordinary attribute of a threading.local, which torch.compile can trace and guards.
"""

import threading
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from .replaced import Replaced


class _Thread(threading.local):
    def __init__(self) -> None:  # torch.compile would read a default of the class in place of what a thread has set
        self.contexts: tuple[Replaced, ...] = ()


class _Process:
    context: Optional["Replaced"] = None


THREAD, _PROCESS = _Thread(), _Process()


def present() -> Optional["Replaced"]:
    """The context whose options a call of this thread follows; None outside of any."""
    contexts = THREAD.contexts
    if contexts and contexts[-1].entered:
        return contexts[-1]
    for context in reversed(contexts):
        if context.entered:
            return context
    return _PROCESS.context


def push(context: "Replaced") -> None:
    """This thread is in the context."""
    THREAD.contexts = (*THREAD.contexts, context)


def remove(context: "Replaced") -> None:
    """This thread has left the context, wherever it stands among those that it is in."""
    contexts = list(THREAD.contexts)
    for i in reversed(range(len(contexts))):
        if contexts[i] is context:
            del contexts[i]
            break
    THREAD.contexts = tuple(contexts)


def set_for_process(context: Optional["Replaced"]) -> Optional["Replaced"]:
    """What threads without a context of their own follow from now on; returns what they followed before."""
    before, _PROCESS.context = _PROCESS.context, context
    return before
