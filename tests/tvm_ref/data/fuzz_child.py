"""Gives mutated files to every reader in limited memory: `python -m tests.tvm_ref.data.fuzz_child N SEED`.

It exits with 0 if each file was read or refused with one of the readers' errors, within the time and the memory (a
MemoryError that a reader turned into one of its own counts as too much), and if nothing was executed on the way.
"""

import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from tests.tvm_ref.data.archives import images, latents, npy, png
from tvm_ref.convert import ModuleUnpickler, network_config, tensors_of
from tvm_ref.data.archive import ImageArchive, LatentArchive
from tvm_ref.data.fingerprint import fingerprint, read_fingerprint
from tvm_ref.data.npy import read_npy
from tvm_ref.data.safe_pickle import load
from tvm_ref.data.safetensors_header import read_header
from tvm_ref.quality.reference import load_moments
from tvm_ref.training.checkpoint import CheckpointError, read_step
from tvm_ref.training.config import load_config, save_config

MOST_SECONDS = 5  # of processor time, since the machine may have other work
MOST_WAIT = 60  # seconds for a reader that waits in place of working
MOST_MEMORY = 2**30  # bytes beyond what the modules take
EXECUTION = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
INSTALLED = (sys.base_prefix, sys.prefix, "<frozen")
Reader = Callable[[Path], Any]


class Late(BaseException):
    """A reader took too long. No reader may turn this into an error of its own."""


def seeds() -> dict[str, tuple[bytes, Reader]]:
    """A whole file for each reader, by the name that the reader wants."""
    state = OrderedDict({"pos_embed": torch.ones(1, 4, 8), "blocks.0.attn.q_norm.weight": torch.ones(4)})
    contents = {"net": state, "mu": np.arange(3.0), "sigma": np.eye(3), "plain": [1, "text", (2.5, {None})]}
    modern, legacy, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(contents["net"], modern)
    torch.save(contents["net"], legacy, _use_new_zipfile_serialization=False)
    np.savez_compressed(archive, mu=np.arange(3.0), sigma=np.eye(3))
    with tempfile.TemporaryDirectory() as folder:
        from tests.tvm_ref.runs import toy

        save_config(toy(Path(folder)), Path(folder) / "config.json")
        config = (Path(folder) / "config.json").read_bytes()
    body = {"step": 3, "files": {"config.json": {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}}}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    manifest = (json.dumps(body | {"sha256": digest}, indent=2) + "\n").encode()
    weights = lambda path: network_config(tensors_of(load(path, ModuleUnpickler), path.stat().st_size))  # noqa: E731
    return {
        "old.pkl": (pickle.dumps(contents, 2), weights),
        "new.pkl": (pickle.dumps(contents, 5), lambda path: load(path)),
        "moments.pkl": (pickle.dumps({"mu": np.arange(3.0), "sigma": np.eye(3)}, 4), load_moments),
        "modern.pt": (modern.getvalue(), weights),
        "legacy.pt": (legacy.getvalue(), weights),
        "moments.npz": (archive.getvalue(), load_moments),
        "array.npy": (npy(np.ones((8, 5, 3), np.float32)), lambda path: read_npy(path.read_bytes())),
        "image.png": (png(np.zeros((4, 6, 3), np.uint8)), lambda path: ImageArchive(folder_of(path), 0).item(0)),
        "images.zip": (stored(images()), lambda path: ImageArchive(path, 3).item(1)),
        "latents.zip": (stored(latents()), lambda path: LatentArchive(path, 3, "imagenet256").item(1)),
        "config.json": (config, load_config),
        "manifest.json": (manifest, lambda path: read_step(path.parent)),
        "dataset.json": (images()["dataset.json"], lambda path: ImageArchive(beside_images(path), 3).item(0)),
        "data.json": (fingerprint_of_images(), read_fingerprint),
        "weights.safetensors": (save_safetensors({"a": torch.ones(3), "b": torch.ones(2, 2)}), read_header),
    }


def fingerprint_of_images() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images.zip").write_bytes(stored(images()))
        found = fingerprint(ImageArchive(Path(folder) / "images.zip", 3))
    return json.dumps(found, indent=2).encode()


def beside_images(path: Path) -> Path:
    """A folder of the images that the labels are of."""
    folder = path.parent / "labelled"
    for name, content in images().items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    os.replace(path, folder / path.name)
    return folder


def stored(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def folder_of(path: Path) -> Path:
    """A folder that holds the file alone."""
    folder = path.parent / "alone"
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / path.name)
    return folder


NUMBERS = st.sampled_from([0, 1, 127, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
PIECES = st.one_of(
    st.binary(max_size=12),
    NUMBERS.map(lambda number: struct.pack("<Q", number)),
    NUMBERS.map(lambda number: struct.pack(">I", number % 2**32)),
    st.sampled_from([b"[" * 5000, b"(" * 5000, b"2\x86" * 60, b"r\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x00",
                     b"cos\nsystem\n(S'touch executed'\ntR.", b"\x93\x8c\x02os", b"1e999", b"-1", b"null", b"R", b"b",
                     b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"]),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["put", "insert", "cut", "copy", "end"]), PIECES), max_size=4
)


def mutated(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, piece in edits:
        at = int(where * len(content))
        if kind == "put":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "cut":
            content = content[:at] + content[at + len(piece) :]
        elif kind == "copy":
            content = content[:at] + content[at : at + 60] + content[at:]
        else:
            content = content[:at]
    return content


def inside(name: str, content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Mutates a file; of a zip file a member, which gets the right checksum, so that mutations get behind it."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return mended(name, mutated(content, edits))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    chosen = sorted(members)[len(edits) % len(members)]
    members[chosen] = mended(chosen, mutated(members[chosen], edits))
    return stored(members)


def mended(name: str, content: bytes) -> bytes:
    """Gives the first member of a PNG file its right checksum again."""
    if not name.endswith(".png") or len(content) < 33:
        return content
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and all that it came from."""
    return [] if error is None else [error, *causes(error.__cause__ or error.__context__)]


def main(examples: int, number: int) -> None:
    sources, executed = seeds(), []
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    for name, (content, read) in sources.items():  # also imports what readers import late
        (folder / name).write_bytes(content)
        try:
            read(folder / name)
        except CheckpointError as error:
            assert name == "manifest.json" and "was added" in str(error), error
        except ValueError as error:
            assert "weights: expected those of a DiT" in str(error) or "pickle: expected a module" in str(error), error
    torch.set_num_threads(1)

    def late(*_: object) -> None:
        raise Late(f"more than {MOST_SECONDS} s")

    for number_of in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number_of, late)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        """Notes what starts a process, and code that is not a module of an installed package."""
        if event in EXECUTION or (event == "exec" and not arguments[0].co_filename.startswith(INSTALLED)):
            executed.append(event)

    sys.addaudithook(watch)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MOST_MEMORY, here + MOST_MEMORY))

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(sorted(sources)), EDITS, st.booleans())
    def check(name: str, edits: list[tuple[float, str, bytes]], mend: bool) -> None:
        content, read = sources[name]
        path = folder / name
        path.write_bytes(inside(name, content, edits) if mend else mutated(content, edits))
        executed.clear()
        signal.alarm(MOST_WAIT)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        try:
            read(path)
        except (ValueError, OSError, CheckpointError) as error:  # what the commands print as one line
            assert len(str(error)) < 20_000, error
            assert not any(isinstance(cause, MemoryError) for cause in causes(error)), error
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        assert not executed and not (folder / "executed").exists(), executed

    check()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
