"""Unfinished work: its finished parts are kept in a folder beside --out, so that a command that was stopped goes on.

A part is a file that is complete or absent. Which process makes a part does not change what is in it, so any number of
processes can go on with a folder, and the end result is that of one process that was never stopped, bit for bit.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from flashjvp_commands.terminal import Bar

from .data.fingerprint import changes
from .data.untrusted import read_settings
from .training.files import write_atomically
from .training.parallel import World
from .training.run_lock import RunLock

ENDING, SETTINGS, PART, DELIVERED, FINISHED = ".unfinished", "settings.json", ".part", ".delivered", "finished"
DIGEST = hashlib.sha256().digest_size
T = TypeVar("T")
Tensors = dict[str, Tensor]


class UnfinishedError(ValueError):
    """The work cannot go on: other settings, a damaged part, a process that failed. The message says what to do."""


def beside(out: Path) -> Path:
    """The folder of the unfinished work for `out`."""
    return out.with_name(out.name + ENDING)


def is_delivered(folder: Path, path: Path) -> bool:
    """Whether `path` was written by the work in `folder`, which was then killed before its end."""
    if not path.exists() or not folder.is_dir():
        return False
    marked = (folder / (path.name + DELIVERED)).exists() and not _draft(path).exists()
    return marked or (folder / FINISHED).exists() or not any(folder.iterdir())


def remove(folder: Path) -> None:
    """Removes the folder of finished work. If this is killed, `is_delivered` still holds, and it can be repeated."""
    finished = folder / FINISHED
    if (folder / SETTINGS).exists():
        (folder / SETTINGS).replace(finished)
    finished.touch()
    for path in folder.iterdir():
        if path != finished:
            _remove(path)
    finished.unlink()
    folder.rmdir()


def forget(out: Path, settings: dict[str, Any] | None = None) -> bool:
    """Removes the folder beside `out` if its work is finished, and a kill kept it from being removed.

    Returns whether it was the work of these settings, so that nothing is left to do.
    """
    finished = beside(out) / FINISHED
    if not finished.exists():
        return False
    try:
        same = bool(read_settings(finished) == _plain(settings))
    except ValueError:  # an empty file, of a folder whose settings were removed
        same = False
    remove(beside(out))
    return same


def together(world: World, work: Callable[[], T]) -> T:
    """Calls `work` in the first process and returns its result in every one. What it raises there ends all of them."""
    result: Any = None
    failed = None
    try:
        result = work() if world.first else None
    except Exception as error:  # it must reach every process, or the others would wait forever
        failed = error
    result, reason = world.gather((result, None if failed is None else str(failed) or type(failed).__name__))[0]
    if failed is not None:
        raise failed
    if reason is not None:
        raise UnfinishedError(reason)
    return result


class Unfinished:
    """The folder of a piece of work, as a context: one process group at a time works in it.

    Leaving it after an error or a signal says what is kept; an empty folder is removed.
    """

    def __init__(self, out: Path | None, settings: dict[str, Any], world: World, *, lasts: bool = True) -> None:
        """Opens the folder beside `out`, or makes it. Every process calls it, with the same arguments.

        out: None means a temporary folder of this machine, which is removed at the end.
        settings: what decides about the content of the parts, as plain values.
        lasts: False means to begin anew, and to keep nothing of what is not finished.

        Raises on every process: UnfinishedError for a folder of other settings, RunLockedError, OSError.
        """
        self._world, self._lasts = world, lasts and out is not None
        self.folder = Path(together(world, lambda: _made(out, lasts)))
        if not self.folder.is_dir():
            raise UnfinishedError(f"{self.folder} is not there: with several machines, --out must be on a shared disk")
        self._lock = RunLock(self.folder, world, option="out")
        try:
            together(world, lambda: self._begin(settings))
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = len(list(self.folder.glob(f"*{PART}"))) if self.folder.is_dir() else 0
        if self._world.first and (not self._lasts or not done):
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self._world.first and kind is not None:
            kept = f"{done} finished parts are kept in {self.folder}: the same command goes on from there"
            print(kept, file=sys.stderr, flush=True)
        self._lock.release()

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return (self.folder / (name + PART)).is_file()

    def read(self, name: str) -> Tensors:
        """Returns a part. Raises UnfinishedError for one that is damaged, which is removed, or absent."""
        path = self.folder / (name + PART)
        content = path.read_bytes() if path.is_file() else b""
        try:
            if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
                return safetensors.torch.load(content[DIGEST:])
        except SafetensorError:
            pass
        path.unlink(missing_ok=True)
        raise UnfinishedError(f"{path} was damaged, and is removed: the same command makes this part again")

    def write(self, name: str, tensors: Tensors) -> None:
        """Keeps a part, which is on the disk before it gets its name."""
        content = safetensors.torch.save({key: x.contiguous().cpu() for key, x in tensors.items()})
        write_atomically(
            self.folder / (name + PART), lambda draft: draft.write_bytes(hashlib.sha256(content).digest() + content)
        )

    def complete(
        self,
        names: Sequence[str],
        make: Callable[[str], Tensors],
        *,
        title: str,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Makes the parts that are missing, each process its share. Returns whether all are there.

        make: makes a part. All processes call it equally often, as networks with sharded weights need; so of the last
            round some results are not kept.
        title: what the parts are, for the bar in a terminal.
        stop: asked before each part; if any process says so, all of them end, and the result is False.

        Raises what `make` raised in this process, or UnfinishedError for what it raised in another.
        """
        world = self._world
        missing = together(world, lambda: [name for name in names if not self.has(name)])
        for first in self._shown(title, range(0, len(missing), world.size), len(missing), len(names)):
            place = first + world.rank
            failed, asked = None, stop()
            try:
                tensors = {} if asked else make(missing[min(place, len(missing) - 1)])
                if tensors and place < len(missing):
                    self.write(missing[place], tensors)
            except Exception as error:  # as in `together`
                failed = error
            outcomes = world.gather((asked, failed and f"process {world.rank}: {failed or type(failed).__name__}"))
            if failed is not None:
                raise failed
            for _, reason in outcomes:
                if reason is not None:
                    raise UnfinishedError(reason)
            if any(asked for asked, _ in outcomes):
                return False
        return True

    def deliver(self, path: Path, write: Callable[[Path], None]) -> None:
        """Writes a result, which appears under its name once it is complete.

        write: makes the file or folder at the path that it is given. Only one process calls this.
        """
        draft, mark = _draft(path), self.folder / (path.name + DELIVERED)
        mark.unlink(missing_ok=True)
        _remove(draft)
        write(draft)
        mark.touch()
        draft.rename(path)

    def remove(self) -> None:
        """Removes the folder: the work is finished. Only one process calls this."""
        remove(self.folder)

    def _begin(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        now = _plain(settings)
        if path.exists() and (changed := changes(read_settings(path), now)):
            raise UnfinishedError(
                f"{self.folder} is unfinished work with other settings ({'; '.join(changed)}): give the same ones, or "
                "another --out, or remove that folder"
            )
        for draft in self.folder.glob(".*.draft"):
            draft.unlink()
        write_atomically(path, lambda draft: draft.write_text(json.dumps(now, indent=2)))

    def _shown(self, title: str, places: range, missing: int, total: int) -> Iterator[int]:
        """The places, with a bar in the first process's terminal."""
        console = Console(stderr=True)
        hidden = not (self._world.first and console.is_terminal)
        with Bar(console, title, total, done=total - missing, hidden=hidden) as bar:
            for place in places:
                yield place
                bar.advance_by(min(self._world.size, missing - place))


def _made(out: Path | None, lasts: bool) -> str:
    if out is None:
        return tempfile.mkdtemp(prefix="flashjvp-")
    if lasts:
        forget(out)
    else:
        _remove(beside(out))
    beside(out).mkdir(parents=True, exist_ok=True)
    return str(beside(out))


def _plain(settings: Any) -> Any:
    """As they are read from a file."""
    return json.loads(json.dumps(settings))


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
