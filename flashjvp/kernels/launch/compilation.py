"""Compiles kernels, those of one call side by side: most of a compiler's time needs no Python.

A call launches its kernels one after the other, and each is looked for when its turn comes. So where the first one is
missing, the call is broken off and made again with nothing launched, which tells all that it needs; they are compiled
in threads, and then the call is made in earnest.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import triton
from triton import JITFunction

from .driver import on_device

# From Triton 3.4 on; a Triton without it compiles one kernel after the other.
_Mode: Any = getattr(triton, "AsyncCompileMode", None)


class Wanted(NamedTuple):
    """A kernel to compile, and where to keep it."""

    index: int | None  # of the device
    kernel: Any
    args: Sequence[Any]  # examples of its arguments
    constants: dict[str, Any]  # and the options of the compiler
    kept: dict[Any, Any]
    key: Any

    def compile(self) -> Any:
        """What Triton makes of it: in an AsyncCompileMode, a promise of it."""
        with on_device(self.index):
            return self.kernel.warmup(*self.args, grid=(1,), **self.constants)

    def keep(self, found: Any) -> Any:
        """The compiled kernel, from now on known."""
        found = found.result() if hasattr(found, "result") else found
        if found is not None:
            self.kept[self.key] = found
        return found


class _Thread(threading.local):
    """What a thread is about.

    collected: in `kernels_of`, where nothing is launched, what was wanted so far. may_break_off: its call may be made
    again.
    """

    collected: dict[Any, Wanted] | None = None
    may_break_off = False


THREAD = _Thread()


class Missing(Exception):
    """A kernel is not compiled, and its call may be made again."""


def is_compiled(kernel: Any) -> bool:
    """Whether a kernel is one for Triton's compiler: under TRITON_INTERPRET=1 there are none."""
    return isinstance(kernel, JITFunction)


def compiled(wanted: Wanted, may_break_off: bool) -> Any:
    """The compiled kernel; None where nothing is to be launched. `may_break_off`: the call may be made again."""
    if THREAD.collected is not None:
        THREAD.collected[wanted.key] = wanted
        return None
    if may_break_off and THREAD.may_break_off:
        raise Missing
    return wanted.keep(wanted.compile())


def kernels_of(function: Callable[..., object], *args: Any, **options: Any) -> list[Wanted]:
    """The kernels that a call would launch and that are not compiled. Nothing is launched; results have no meaning."""
    collected: dict[Any, Wanted] = {}
    THREAD.collected = collected
    try:
        function(*args, **options)
    finally:
        THREAD.collected = None
    return list(collected.values())


def compile_all(wanted: Sequence[Wanted]) -> None:
    """Compiles and keeps kernels, as many at a time as there are cores."""
    if _Mode is None or len(wanted) < 2:
        for x in wanted:
            x.keep(x.compile())
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(len(wanted), cores)) as threads, _Mode(threads, ignore_errors=True):
        promised = [x.compile() for x in wanted]
        # Raises what the compiler raised, which Triton 3.9 forgets at the end of the block.
        for x, promise in zip(wanted, promised, strict=True):
            x.keep(promise)
