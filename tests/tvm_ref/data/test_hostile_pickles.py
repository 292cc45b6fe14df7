"""Pickles and files of torch.save made to exhaust memory, time or the stack: each is refused in one line."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tvm_ref.convert import convert, main
from tvm_ref.data.safe_pickle import SafeUnpickler, UnsafePickleError, load
from verify.oracles.network import tiny, trained

MOST = 64 * 2**20  # bytes that a refusal may take
ROOT = Path(__file__).resolve().parents[3]


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def laughs(levels: int) -> bytes:
    """A pickle of tuples in tuples: 2^levels leaves from 5 bytes a level."""
    return b"".join(b"2\x86" for _ in range(levels))


def tensor(*view: Any) -> bytes:
    storage = torch.arange(4.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, typed, *view, False, OrderedDict()), 2)


BOMBS: dict[str, bytes] = {
    "nested tuples as a key": b"\x80\x02})" + laughs(100) + b"Ns.",
    "nested tuples in a set": b"\x80\x04\x8f()" + laughs(100) + b"\x90.",
    "nested tuples": b"\x80\x02)" + laughs(2000) + b".",
    "a key nested too deeply": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a place beyond any": b"\x80\x02]r\xff\xff\xff\x7f.",
    "bytes beyond the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**52) + b"abc.",
    "text beyond the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**34) + b"abc.",
    "a frame beyond the file": b"\x80\x04\x95" + struct.pack("<Q", 2**45) + b"N.",
    "a bytearray by its size": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "stride 0": tensor(0, (10**15,), (0,)),
    "overlapping strides": tensor(0, (3, 3), (0, 1)),
    "more numbers than there are": tensor(0, (2**40, 0, 2**40), (1, 1, 1))[:-1] + b"0" + b".",
    "state of a tensor": tensor(0, (4,), (1,))[:-1] + b"}b.",
    "attributes of a builder": b"\x80\x02c_codecs\nencode\n}X\x06\x00\x00\x00_buildNsb.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_asks_for_too_much_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError, match=r"^\S*bomb.pkl: [^\n]*$"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_objects_cannot_be_changed_by_a_pickle() -> None:
    for name in ("attributes of a builder", "state of a tensor"):
        with pytest.raises(UnsafePickleError, match="expected no state for"):
            SafeUnpickler(io.BytesIO(BOMBS[name])).load()


@pytest.mark.parametrize("modern", [True, False])
def test_a_file_of_torch_save_is_read_without_torch_load(
    tmp_path: Path, modern: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    contents = {
        "views": [base[1:3, ::2], base.T, base.bfloat16(), torch.zeros(0, 2), nn.Parameter(base), torch.tensor(3)],
        "plain": OrderedDict(a=(1, 2.5, "text")),
    }
    path = tmp_path / "saved.pt"
    torch.save(contents, path, _use_new_zipfile_serialization=modern)
    monkeypatch.setattr(torch, "load", None)
    found = load(path)
    assert all(map(torch.equal, found["views"], contents["views"])) and found["plain"] == contents["plain"]
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UnsafePickleError, match=r"saved\.pt: "):
            load(path)


@pytest.mark.parametrize("modern", [True, False])
def test_nothing_in_a_file_of_torch_save_is_executed(tmp_path: Path, modern: bool) -> None:
    executed, path = tmp_path / "executed", tmp_path / "saved.pt"
    torch.save({"net": Call(os.system, f"touch {executed}")}, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(UnsafePickleError, match=r"got a reference to \w+\.system"):
        load(path)
    assert not executed.exists()


def zipped(path: Path, change: Any, **options: Any) -> Path:
    """A file of torch.save whose members are changed by `change`."""
    content = io.BytesIO()
    torch.save({"a": torch.arange(3.0)}, content)
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(path, "w", **options) as target:
        for name, data in change({name: source.read(name) for name in source.namelist()}).items():
            target.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("message", "change", "options"),
    [
        ("expected 12 bytes, got 8", lambda files: files | {"archive/data/0": b"01234567"}, {}),
        ("expected 12 bytes, got None", lambda files: {n: f for n, f in files.items() if n != "archive/data/0"}, {}),
        ("without compression", lambda files: files, {"compression": zipfile.ZIP_DEFLATED}),
        ("members of at most", lambda files: files | {"archive/x": bytes(2**22)}, {"compression": zipfile.ZIP_LZMA}),
        ("TorchScript", lambda files: files | {"archive/constants.pkl": b""}, {}),
        ("without data.pkl", lambda files: {"a.txt": b"text"}, {}),
        ("byte order", lambda files: files | {"archive/byteorder": b"big"}, {}),
    ],
)
def test_a_zip_file_that_lies_is_refused(tmp_path: Path, message: str, change: Any, options: Any) -> None:
    with pytest.raises(UnsafePickleError, match=message):
        load(zipped(tmp_path / "saved.pt", change, **options))


def state() -> dict[str, torch.Tensor]:
    return dict(trained(tiny(attention_backend=None), seed=1, dtype=torch.float32).state_dict())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("blocks numbered from 0", {"blocks.999999999.x": torch.zeros(1)}),
        ("blocks numbered from 0", {"blocks.one.x": torch.zeros(1)}),
        ("pos_embed with 3 axes", {"pos_embed": torch.zeros(3)}),
        ("x_embedder.proj.weight with 4 axes", {"x_embedder.proj.weight": torch.zeros(2, 0, 2, 2)}),
        ("embedding_table.weight with 2 axes", {"y_embedder.embedding_table.weight": torch.tensor(1.0)}),
        ("expected a module or a state dict", {3: torch.zeros(1)}),
    ],
)
def test_weights_that_are_no_network_are_refused_in_one_line(
    tmp_path: Path, message: str, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps(state() | change))
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        main([str(path), str(tmp_path / "weights.safetensors")])
    assert [file.name for file in tmp_path.iterdir()] == ["network.pkl"]


def test_many_names_of_one_storage_are_refused(tmp_path: Path) -> None:
    one = torch.zeros(2**16)
    path = tmp_path / "network.pkl"
    torch.save({f"blocks.0.{i}": one[:] for i in range(500)}, path)
    with pytest.raises(ValueError, match="expected weights of at most"):
        convert(path, tmp_path / "weights.safetensors")


def test_torch_saved_weights_convert(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "network.pt")
    assert convert(tmp_path / "network.pt", tmp_path / "weights.safetensors") == tiny(attention_backend=None)


def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(BOMBS["nested tuples as a key"])
    command = [sys.executable, "-m", "tvm_ref.convert", str(path), str(tmp_path / "weights.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
