"""`convert`: published weights are converted, and pickles that try to execute code are refused."""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tvm_ref.convert import ModuleUnpickler, SafeUnpickler, UnsafePickleError, convert, main
from tvm_ref.data.safe_pickle import load
from tvm_ref.model.dit import DiT
from verify.oracles.network import tiny, trained

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny(attention_backend=None)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Persistent(nn.Module):
    """Pickles like a published module: a call of a function that would execute the source code in `module_src`."""

    source = ""

    def __reduce__(self) -> Any:
        reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": "DiT", "state": self.__dict__}
        return reconstruct, (meta,), None


class Hostile:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def as_published(module: nn.Module, source: str) -> nn.Module:
    """The same tree of parameters; modules that are not torch's pickle with their source code."""
    if type(module).__module__.startswith("torch.nn"):
        result = copy.copy(module)
    else:
        result = Persistent()
        result.source = source
        result._parameters = module._parameters
        result._buffers = dict(module._buffers)
    result._modules = {name: as_published(child, source) for name, child in module._modules.items()}
    return result


@pytest.fixture
def published_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that published files refer to; to be gone when the file is read."""

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
        raise AssertionError("the file was executed")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def write(path: Path, contents: object, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(contents, protocol=protocol))
    return path


@pytest.mark.usefixtures("published_classes")
@pytest.mark.parametrize("compiled", ["", "by state", "by arguments"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_published_module_gives_weights_that_load_strictly(tmp_path: Path, compiled: str, protocol: int) -> None:
    network, executed = trained(CONFIG, seed=1, dtype=torch.float32), tmp_path / "executed"
    wrapper = Persistent()
    wrapper.model = as_published(network, f"open({str(executed)!r}, 'w')")
    wrapper.register_buffer("scratch", torch.zeros(3), persistent=False)
    wrapper.dtype = torch.bfloat16  # type: ignore[assignment]
    wrapper.compiler = (contextlib.nullcontext(), wrapper.model.x_embedder.proj.extra_repr)  # type: ignore[assignment]
    net: object = wrapper
    if compiled == "by state":
        net = Persistent()
        net._modules["_orig_mod"] = wrapper
    elif compiled == "by arguments":
        net = Hostile(torch._dynamo.eval_frame.OptimizedModule, wrapper, None)
    pickled = write(tmp_path / "network.pkl", {"net": net, "dataset_kwargs": {"path": "x", "seed": None}}, protocol)
    for name in ("torch_utils.persistence", "torch_utils"):
        del sys.modules[name]
    weights = tmp_path / "weights.safetensors"
    assert convert(pickled, weights) == CONFIG
    loaded = DiT(CONFIG)
    loaded.load_state_dict(load_file(weights), strict=True)
    assert all(map(torch.equal, loaded.state_dict().values(), network.state_dict().values()))
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["dit_config"]) == asdict(CONFIG)
    assert weights.stat().st_mode == pickled.stat().st_mode  # safetensors makes files for their owner alone
    assert not executed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.pkl", "weights.safetensors"]


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.model."])
def test_a_plain_state_dict_converts(tmp_path: Path, prefix: str) -> None:
    network = trained(tiny(num_classes=0, guidance=False, attention_backend=None), seed=1, dtype=torch.float32)
    state = OrderedDict((prefix + name, tensor) for name, tensor in network.state_dict().items())
    source, target = write(tmp_path / "network.pkl", state), tmp_path / "weights.safetensors"
    assert convert(source, target) == network.config
    DiT(network.config).load_state_dict(load_file(target), strict=True)


def test_the_command_line(tmp_path: Path) -> None:
    state = dict(trained(CONFIG, seed=1, dtype=torch.float32).state_dict())
    source, target = write(tmp_path / "network.pkl", state), tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "tvm_ref.convert", str(source), str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert load_file(target).keys() == state.keys()


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "python -m tvm_ref.convert" in shown and "published .pkl" in shown


@pytest.mark.parametrize("unpickler", [SafeUnpickler, ModuleUnpickler])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_in_a_hostile_file_is_executed(tmp_path: Path, protocol: int, unpickler: Any) -> None:
    executed = tmp_path / "executed"
    text = f"open({str(executed)!r}, 'w')"
    calls = {
        "system": (os.system, f"touch {executed}"),
        "eval": (eval, text),
        "exec": (exec, text),
        "delattr": (delattr, "text", "join"),
        "run": (subprocess.run, ["touch", str(executed)]),
        "load": (torch.load, str(executed)),
        "partial": (__import__("functools").partial, eval, text),
        "_rebuild_from_type_v2": (torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (text,), {}),
    }
    for name, (function, *arguments) in calls.items():
        for contents in (Hostile(function, *arguments), {"net": [Hostile(function, *arguments)]}):
            path = write(tmp_path / f"{name}.pkl", contents, protocol)
            with pytest.raises(
                UnsafePickleError, match=rf"{name}.pkl: pickle: expected .*, got a reference to .*{name}$"
            ):
                load(path, unpickler)
    assert not executed.exists()


@pytest.mark.usefixtures("published_classes")
def test_a_hostile_call_inside_a_published_module_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    executed, target = tmp_path / "executed", tmp_path / "weights.safetensors"
    target.write_bytes(b"what was there")
    wrapper = Persistent()
    wrapper.model = as_published(trained(CONFIG, seed=1, dtype=torch.float32), "")
    wrapper.extra = Hostile(os.system, f"touch {executed}")  # type: ignore[assignment]
    path = write(tmp_path / "network.pkl", {"net": wrapper})
    with pytest.raises(UnsafePickleError, match=r"network.pkl: pickle: .* got a reference to \w+.system"):
        convert(path, target)
    assert not executed.exists() and target.read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_hostile_pickle_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    executed, inner = tmp_path / "executed", tmp_path / "inner"
    torch.save(Hostile(os.system, f"touch {executed}"), inner)
    path = write(tmp_path / "tensor.pkl", Hostile(torch.storage._load_from_bytes, inner.read_bytes()))
    with pytest.raises(UnsafePickleError, match=r"tensor.pkl"):
        load(path)
    assert not executed.exists()


@pytest.mark.parametrize(
    "view",
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,)), (-1, (2,), (1,)), (0, (2,), (1, 1))],
)
def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path: Path, view: tuple[Any, ...]) -> None:
    """torch would enlarge the storage by memory that nobody wrote."""
    storage = torch.arange(4.0).storage()
    path = write(
        tmp_path / "tensor.pkl", Hostile(torch._utils._rebuild_tensor_v2, storage, *view, False, OrderedDict())
    )
    with pytest.raises(UnsafePickleError, match=r"tensor.pkl: tensor: expected .*, got "):
        load(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_arrays_and_plain_containers_come_back(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    contents = {
        "tensors": [base[1:3, ::2], base.T, base.bfloat16(), torch.tensor(3), torch.zeros(0, 2), nn.Parameter(base)],
        "arrays": (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), "f4")), np.arange(3, dtype=">i2")),
        "plain": OrderedDict(a=[1, 2.5, None, True, "text", b"bytes", (1, {2})]),
        "scalar": np.float64(2.5),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }
    found = load(write(tmp_path / "plain.pkl", contents, protocol))
    assert all(map(torch.equal, found["tensors"], contents["tensors"]))
    for array, expected in zip(found["arrays"], contents["arrays"], strict=True):
        assert array.dtype == expected.dtype and np.array_equal(array, expected)
    assert found["plain"] == contents["plain"] and type(found["plain"]) is OrderedDict
    assert found["scalar"] == 2.5 and found["dtype"] is torch.float32 and found["size"] == (2, 3)


@pytest.mark.parametrize("array", [np.array([{"a": 1}], dtype=object), np.zeros(2, dtype="f8,i4"), np.array(["text"])])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_that_are_not_numeric_are_refused(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    with pytest.raises(UnsafePickleError, match=r"array.pkl: array: expected a numeric dtype"):
        load(write(tmp_path / "array.pkl", {"mu": array}, protocol))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = pickle.dumps({"weights": torch.arange(100.0), "mu": np.arange(10.0)})
    path = tmp_path / "damaged.pkl"
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UnsafePickleError, match=r"damaged.pkl: "):
            load(path)


def test_a_reference_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outside.pkl"
    path.write_bytes(b"Pstorage-0\n.")
    with pytest.raises(UnsafePickleError, match=r"outside reference 'storage-0'"):
        load(path)


def test_weights_that_are_not_those_of_a_dit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    state = dict(trained(CONFIG, seed=1, dtype=torch.float32).state_dict())
    without = {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.proj.bias"}
    of_another_shape = state | {"final_layer.linear.bias": torch.zeros(3)}
    cases = {
        "blocks.1.attn.proj.bias: expected shape": without,
        "final_layer.linear.bias: expected shape": of_another_shape,
        "unknown: expected shape None": state | {"unknown": torch.zeros(1)},
        "none named pos_embed": {name: tensor for name, tensor in state.items() if name != "pos_embed"},
        "got some": {"some": torch.zeros(1)} | {f"model.{name}": tensor for name, tensor in state.items()},
        "expected a module or a state dict, got 'net' with 3": {"net": 3},
        "expected a module or a state dict, got an object of type dict": {},
        "expected a module or a state dict, got null": None,
    }
    for message, contents in cases.items():
        with pytest.raises(ValueError, match=rf"network\.pkl: .*{message}"):
            convert(write(tmp_path / "network.pkl", contents), tmp_path / "weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["network.pkl"]


def test_settings_are_checked_before_the_file_is_read(tmp_path: Path) -> None:
    """To read a large file takes minutes."""
    with pytest.raises(ValueError, match=r"settings: expected a config\.json or one of digits, .*, got 'digit'"):
        convert(tmp_path / "none.pkl", tmp_path / "weights.safetensors", "digit")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    path = write(tmp_path / "network.pkl", dict(trained(CONFIG, seed=1, dtype=torch.float32).state_dict()))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        convert(path, tmp_path / "weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["network.pkl"]
