"""One line that says what to install, for a command whose packages are missing."""

import importlib.util
import signal
import sys
from itertools import pairwise
from pathlib import Path

from .ending import say_what_ended

HERE = Path(__file__).resolve().parent
# The folder that verify, bench and reports lie in: that of the checkout, or of the wheel.
TOOLS = HERE / "tools" if (HERE / "tools").is_dir() else HERE.parent
# What each extra of pyproject.toml brings, as it is imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "filelock", "numpy", "PIL", "ot", "rich", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tyro",
        "yaml",
    ),
    "latents": ("diffusers",),
    "wandb": ("wandb",),
    "float8": ("torchao",),
    "eval": ("matplotlib", "numpy", "pandas", "PIL", "ot", "rich", "sklearn", "scipy", "torchmetrics"),
}  # fmt: skip


def advice(*extras: str) -> str | None:
    """What to install for these extras, or None if everything is there."""
    missing = [name for extra in extras for name in EXTRAS[extra] if not _is_installed(name)]
    if not missing:
        return None
    return f"error: {', '.join(dict.fromkeys(missing))} not installed: pip install 'flashjvp[{','.join(extras)}]'"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # hidden from Python by a finder, or by an entry of sys.modules
        return False


def needed_by_commands(package: str, *extras: str) -> None:
    """For the start of a package. Does nothing but where Python was started to run a module of it (`python -m`).

    There, packages that are missing and errors while others are imported end it with one line, Ctrl-C ends it without a
    traceback until the command itself sees to that, and verify, bench and reports are found before any others of these
    names.
    """
    if not _runs(package):
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = say_what_ended
    sys.path.insert(0, str(TOOLS))
    if text := advice(*extras):
        raise SystemExit(text)


def _runs(package: str) -> bool:
    """Whether this process is `python -m PACKAGE` or `python -m PACKAGE.MODULE`, and is about to import the module."""
    modules = [word for option, word in pairwise(sys.orig_argv) if option == "-m"]
    return sys.argv[:1] == ["-m"] and f"{''.join(modules[:1])}.".startswith(f"{package}.")
