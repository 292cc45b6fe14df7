"""Saves and loads checkpoints, which are written atomically, verified by checksums, and contain no pickles.

A checkpoint is a folder `step-00000100` with

    shard-*.safetensors   tensors, written by torch.distributed.checkpoint (DCP); each process writes its shards, and
                          any number of processes can load them
    config.json           the TrainConfig
    data.json             the fingerprint of the data set, see data/fingerprint.py
    observed.json         what the logs have yet to write, see observe.py
    manifest.json         the step number, the size and SHA-256 of every other file, and a SHA-256 of itself

It is written under another name, flushed to the disk (fsync) and renamed, so it is either complete or absent. What a
file manager leaves in the folder, such as .DS_Store, is ignored; `stray` lists it. Any other added file is damage.
"""

import fnmatch
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..data.safetensors_header import read_header
from ..data.untrusted import MOST_SETTINGS, parse_json, read_regular, read_settings, shown
from ..model.dit import DiT
from .checkpoint_folder import DRAFT, checkpoints, remove_old
from .config import TrainConfig, load_config, save_config
from .files import to_disk
from .parallel import World

MANIFEST, CONFIG, DATA, OBSERVED = "manifest.json", "config.json", "data.json", "observed.json"
# What file managers and network file systems leave in a folder.
STRAY = (".DS_Store", "._*", ".nfs*", ".directory", "Thumbs.db", "desktop.ini")
ALONE = World(0, 1, torch.device("cpu"))
Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or found, is damaged, or does not match the network."""


class LoadedModel(NamedTuple):
    """A network and the configuration of the run that trained it."""

    model: DiT
    config: TrainConfig


def save(
    folder: Path, step: int, tensors: Tensors, config: TrainConfig, world: World, notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes checkpoint `step` into `folder`, then removes all but the newest config.run.keep. Every process calls it.

    tensors: sharded ones (DTensor) are given by every process, and written in parts; others by one process at least,
        and written once. Names start with a word and a dot, such as "ema."; tensors with the same first word share
        files.
    notes: the contents of further JSON files: DATA, OBSERVED.

    Returns the checkpoint's path. Raises CheckpointError on every process if it cannot be written; earlier checkpoints
    are then untouched, and nothing of the new one is left.
    """
    path, draft = folder / f"step-{step:08d}", folder / DRAFT
    _together(world, path, lambda: _fresh(draft) if world.first else None)
    names = sorted({name for part in world.gather(list(tensors)) for name in part})
    _together(world, path, lambda: _write_tensors(draft, tensors, names, world))
    files: dict[str, Any] = {}
    for part in _together(world, path, lambda: _describe(draft.glob(f"shard-{world.rank + 1:05d}-*"))):
        files |= part
    _together(world, path, lambda: _finish(draft, path, step, files, config, notes or {}) if world.first else None)
    return path


def read_step(path: Path, world: World = ALONE) -> int:
    """Verifies the checksums of all files of the checkpoint `path`, then returns its step number.

    Raises CheckpointError that names the damaged file and offers the newest intact checkpoint before it.
    """
    faults = [fault for part in world.gather(_faults(path, world)) for fault in part]
    if not faults:
        return int(read_settings(path / MANIFEST)["step"])
    earlier = [other for other in checkpoints(path.parent) if other.name < path.name]
    intact = next((other for other in reversed(earlier) if not _faults(other, ALONE)), None)
    advice = (
        f"{intact} is intact: use it instead (training resumes from it with --run.resume {intact})"
        if intact
        else "there is no intact checkpoint before it: start again with another --run.out"
    )
    raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(faults)}. {advice}.")


def stray(path: Path) -> list[str]:
    """Lists the files in the checkpoint `path`, after `read_step`, that do not belong to it and are ignored."""
    return sorted(_added(path, read_settings(path / MANIFEST)["files"]))


def observed(path: Path) -> Any:
    """The note OBSERVED of a checkpoint; an empty list, if it has none."""
    return (read_settings(path / OBSERVED) if (path / OBSERVED).is_file() else None) or []


def newest_whole(folder: Path, world: World = ALONE) -> Path:
    """Returns the newest undamaged checkpoint in the folder of a run, or in a folder of checkpoints.

    Raises CheckpointError if there is none. Every process calls it.
    """
    found = checkpoints(folder / "checkpoints") or checkpoints(folder)
    for path in reversed(found):
        if not any(world.gather(_faults(path, world))):
            return path
    damaged = f": {', '.join(path.name for path in found)} are damaged" if found else ""
    raise CheckpointError(f"no whole checkpoint in {folder}{damaged}; expected a checkpoint or the folder of a run")


def load(path: Path, tensors: Tensors, world: World = ALONE) -> None:
    """Loads a checkpoint into `tensors`, in place. Every process calls it, after `read_step`.

    Raises CheckpointError for a name or shape that the checkpoint lacks, and for files that are not safetensors.
    """
    try:
        for shard in path.glob("*.safetensors"):
            read_header(shard)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:  # whatever safetensors and DCP raise
        raise CheckpointError(f"checkpoint {path} does not hold the tensors of this run: {_reason(error)}") from error


def load_model(path: Path, *, device: torch.device, weights: Literal["ema", "raw"] = "ema") -> LoadedModel:
    """Loads the network of a checkpoint, or of the newest checkpoint in the folder of a run, for evaluation.

    weights: "ema", the averaged weights that samples are drawn with, or "raw", the weights of the last step.

    Raises CheckpointError for a path without a checkpoint and for a damaged one, ConfigError for a configuration that
    cannot be read. No pickle is read.
    """
    if not (path / MANIFEST).is_file():
        found = checkpoints(path / "checkpoints") or checkpoints(path)
        if not found:
            raise CheckpointError(f"no checkpoint in {path}: expected a folder of a run, or one that holds {MANIFEST}")
        path = found[-1]
    read_step(path)
    config = load_config(path / CONFIG)
    stored = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    if config.model.least_weights > stored:
        raise CheckpointError(f"checkpoint {path} holds {stored} bytes, too few for the network of its {CONFIG}")
    model = DiT(config.model).requires_grad_(False).eval()
    load(path, named("ema" if weights == "ema" else "network", model))
    return LoadedModel(model.to(device), config)


def named(word: str, module: torch.nn.Module) -> Tensors:
    """Returns the tensors of a module under the names "word.name", without copying."""
    return {f"{word}.{name}": value for name, value in module.state_dict().items()}


def _together(world: World, path: Path, work: Any) -> list[Any]:
    """Calls `work` on every process and gathers the results. Raises on every process if it failed on any."""
    result, reason, error = None, "", None
    try:
        result = work()
    except (Exception, CheckpointException) as caught:  # all: it must reach every process, or the others would wait
        reason, error = _reason(caught), caught
    outcomes = world.gather((result, reason))
    failed = next((why for _, why in outcomes if why), "")
    if failed:
        if world.first:
            shutil.rmtree(path.parent / DRAFT, ignore_errors=True)
        if error is not None and isinstance(stop := _cause(error), KeyboardInterrupt):  # a second signal
            raise stop
        before = checkpoints(path.parent)
        advice = f"the newest one is {before[-1]}" if before else "there is none before it"
        raise CheckpointError(
            f"checkpoint {path} could not be written: {failed}; {advice}. "
            "Once there is space, the same command resumes from there."
        ) from error
    return [value for value, _ in outcomes]


def _fresh(draft: Path) -> None:
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)


def _write_tensors(draft: Path, tensors: Tensors, names: list[str], world: World) -> None:
    """Writes the share of this process. names: of the tensors of all processes."""
    words = sorted({name.split(".")[0] for name in names})
    writer = dcp.HuggingFaceStorageWriter(
        str(draft),
        fqn_to_index_mapping={name: 1 + words.index(name.split(".")[0]) for name in names},
        save_distributed=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        alone = not torch.distributed.is_initialized()
        dcp.save(dict(tensors), storage_writer=writer, no_dist=alone, process_group=world.group)


def _finish(
    draft: Path, path: Path, step: int, files: dict[str, Any], config: TrainConfig, notes: Mapping[str, Any]
) -> None:
    save_config(config, draft / CONFIG)
    for name, content in notes.items():
        (draft / name).write_text(json.dumps(content, indent=2) + "\n")
    texts = [draft / name for name in (CONFIG, *notes)]
    (draft / MANIFEST).write_text(_manifest({"step": step, "files": files | _describe(texts)}))
    for file in (*texts, draft / MANIFEST, draft):
        to_disk(file)
    if path.exists():  # the run went back to an earlier checkpoint
        _fresh(path.parent / ".replaced")
        path.rename(path.parent / ".replaced" / path.name)
    draft.rename(path)
    to_disk(path.parent)
    remove_old(path.parent, config.run.keep)


def _describe(files: Any) -> dict[str, Any]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _faults(path: Path, world: World) -> list[str]:
    """Describes what is wrong with a checkpoint. Each process checks its share of the files."""
    try:
        text = read_regular(path / MANIFEST, MOST_SETTINGS)
        body = parse_json(text)
        if not isinstance(body, dict):
            raise ValueError(f"expected an object, got {shown(body)}")
        del body["sha256"]
        if text != _manifest(body).encode() or type(body["step"]) is not int:
            return [f"{MANIFEST} is not as it was written"] if world.first else []
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in sorted(body["files"].items())}
        if foreign := [name for name in files if "/" in name or name.startswith(".")]:
            raise ValueError(f"expected names of files, got {shown(foreign[0])}")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({_reason(error)})"] if world.first else []
    added = [name for name in sorted(_added(path, files)) if not _is_stray(name)]
    faults = [f"{name} was added" for name in added] if world.first else []
    for name, (expected, digest) in list(files.items())[world.rank :: world.size]:
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            got = "is missing, or no file" if size is None else f"has {size} bytes instead of {expected}"
            faults.append(f"{name} {got}")
        elif _sha256(file) != digest:
            faults.append(f"{name} has other content than was written (SHA-256)")
    return faults


def _is_stray(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STRAY)


def _added(path: Path, files: Iterable[str]) -> set[str]:
    return {file.name for file in path.iterdir()} - set(files) - {MANIFEST}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _manifest(body: dict[str, Any]) -> str:
    """Returns the exact text of a manifest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=2) + "\n"


def _cause(error: BaseException) -> BaseException:
    """The error itself, or the first of those that DCP wrapped in one of its own."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _reason(error: BaseException) -> str:
    """Describes the cause of an error in one line."""
    error = _cause(error)
    return " ".join(str(error).split()) or type(error).__name__
