"""One line that says what to install, for a command whose packages are missing."""

import importlib.util
import signal
import sys

# What each extra of pyproject.toml brings, as it is imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "filelock", "numpy", "PIL", "ot", "rich", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tyro",
        "yaml",
    ),
    "latents": ("diffusers",),
    "wandb": ("wandb",),
    "eval": ("matplotlib", "numpy", "pandas", "PIL", "ot", "rich", "sklearn", "scipy", "torchmetrics"),
}  # fmt: skip


def advice(*extras: str) -> str | None:
    """What to install for these extras, or None if everything is there."""
    missing = [name for extra in extras for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"error: {', '.join(dict.fromkeys(missing))} not installed: pip install 'flashjvp[{','.join(extras)}]'"


def needed_by_commands(*extras: str) -> None:
    """For the start of a package: where Python is about to run a module of it (`-m`), packages that are missing end it
    with one line. Ctrl-C ends it without a traceback until the command itself sees to that.
    """
    if sys.argv[:1] != ["-m"]:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if text := advice(*extras):
        raise SystemExit(text)
