"""Converts published weights to safetensors: `python -m tvm_ref.convert network.pkl weights.safetensors`.

A published file is a pickle of a module. It contains the source code of the module's class, and unpickling executes
that code. Here nothing is executed: modules become inert `Record`s, the classes they name are neither imported nor
called, the source code is ignored, and only the tensors are kept.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from flashjvp_commands import ending
from flashjvp_commands.entry import program

from .data.safe_pickle import PYTHON_2, SafeUnpickler, UnsafePickleError, load
from .model.dit import DiT, DiTConfig

__all__ = ["ModuleUnpickler", "SafeUnpickler", "UnsafePickleError", "cli", "convert", "network_config", "tensors_of"]

# Names that may become a record: classes of modules, of their settings and of the compiler (whose bound methods are
# pickled as calls of getattr), and the function that would execute the source code.
RECORDED = re.compile(
    r"torch\.nn\..*|torch\.device|torch\._dynamo\..*|torch\._TorchCompile\w*|torch_utils\.persistence\..*|timm\..*"
    r"|training\..*|omegaconf\..*|dnnlib\..*|typing\.Any|contextlib\.nullcontext|collections\.defaultdict"
    r"|builtins\.(getattr|dict|list|tuple|int|float|str|bool|object)"
)
METADATA = "dit_config"


class Record:
    """An inert stand-in for an object of any class: the name of the class, arguments, state and items."""

    name = ""
    arguments: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> "Record":
        """Creates a record without state or items. This is not `__init__`, which unpicklers may skip."""
        record = super().__new__(cls)
        record.arguments, record.items, record.state = arguments, {}, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, item: Any) -> None:
        """Adds an item, if the object was like a list."""
        self.items[len(self.items)] = item


class ModuleUnpickler(SafeUnpickler):
    """A `SafeUnpickler` that also accepts modules, as records. Everything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class of records, or what `SafeUnpickler.find_class` returns."""
        qualified = f"{PYTHON_2.get(module, module)}.{name}"
        if RECORDED.fullmatch(qualified):
            return type("Record", (Record,), {"name": qualified})
        if qualified == "copyreg._reconstructor":
            return lambda cls, *_: cls()
        return super().find_class(module, name)


def convert(network: Path, weights: Path) -> DiTConfig:
    """Writes the weights in the pickle `network` to the safetensors file `weights`, under the names of a `DiT`.

    Tensors keep their dtypes. The settings of the network are inferred from the weights, returned, and stored in the
    metadata; a `DiT` with them is checked to have exactly these names and shapes. The kinds of normalisation cannot be
    inferred, and are set to the defaults of `DiTConfig`. The file is either complete or absent.

    Raises: UnsafePickleError for a pickle that is damaged or holds more than modules, tensors and plain containers;
    ValueError for one without weights, or with weights that are not those of a `DiT`.
    """
    tensors = tensors_of(load(network, ModuleUnpickler))
    config = network_config(tensors)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        name = differing[0]
        message = f"expected shape {expected.get(name)}, got {got.get(name)} ({len(differing)} such tensors)"
        raise ValueError(f"{network}: {name}: {message}; None = no such tensor")
    temporary = weights.with_name(f".{weights.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(asdict(config))})
        os.replace(temporary, weights)
    finally:
        temporary.unlink(missing_ok=True)
    return config


def tensors_of(contents: Any) -> dict[str, Tensor]:
    """Returns the weights in what a `ModuleUnpickler` read: a module, a state dict, or a dict with one module.

    Names become those of a `DiT`: "_orig_mod." (from torch.compile) and the leading "model." are removed.
    """
    if isinstance(contents, dict):
        modules = {key: value for key, value in contents.items() if _module_state(value) is not None}
        if len(modules) > 1:
            raise ValueError(f"pickle: expected one module, got {sorted(map(str, modules))}")
        if modules:
            (contents,) = modules.values()
    named = contents if isinstance(contents, dict) else dict(_walk(contents))
    if not named or not all(isinstance(tensor, Tensor) for tensor in named.values()):
        raise ValueError(f"pickle: expected a module or a state dict, got {type(contents).__name__}")
    plain = {name.replace("_orig_mod.", ""): tensor.contiguous().clone() for name, tensor in named.items()}
    outside = [name for name in plain if not name.startswith("model.")]
    if outside and len(outside) < len(plain):
        raise ValueError(f"pickle: expected every name to begin with model., or none, got {outside[0]}")
    return plain if outside else {name.removeprefix("model."): tensor for name, tensor in plain.items()}


def network_config(tensors: dict[str, Tensor]) -> DiTConfig:
    """Infers the settings of the network from its weights. Raises ValueError if a tensor needed for this is missing."""
    needed = ("pos_embed", "x_embedder.proj.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"weights: expected those of a DiT with QK norm, got none named {missing[0]}")
    position, patches, head, hidden = (tensors[name].shape for name in needed)
    width, channels, patch = patches[0], patches[1], patches[2]
    table = tensors.get("y_embedder.embedding_table.weight")
    mlp_ratio = hidden[0] / width
    return DiTConfig(
        image_size=round(position[1] ** 0.5) * patch,
        channels=channels,
        patch=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=width // head[0],
        num_classes=0 if table is None else len(table) - 1,
        guidance="guidance_embedder.mlp.0.weight" in tensors,
        mlp_ratio=mlp_ratio,
    )


def _module_state(value: Any) -> dict[str, Any] | None:
    """Returns the attributes of a record that stands for a module, otherwise None."""
    if not isinstance(value, Record):
        return None
    if value.name == "torch._dynamo.eval_frame.OptimizedModule" and value.arguments:  # (the module, the compiler)
        return _module_state(value.arguments[0])
    state = value.state
    if value.name == "torch_utils.persistence._reconstruct_persistent_obj":
        state = value.arguments[0].get("state") if value.arguments and isinstance(value.arguments[0], dict) else None
    return state if isinstance(state, dict) and "_parameters" in state and "_modules" in state else None


def _walk(module: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Lists names and tensors of a recorded module, like its state dict."""
    state = _module_state(module)
    if state is None:
        return []
    transient = state.get("_non_persistent_buffers_set", ())
    buffers = {name: buffer for name, buffer in state.get("_buffers", {}).items() if name not in transient}
    own = {**state["_parameters"], **buffers}
    tensors = [(prefix + name, tensor) for name, tensor in own.items() if tensor is not None]
    for name, child in state["_modules"].items():
        tensors += _walk(child, f"{prefix}{name}.")
    return tensors


def main(
    network: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK")],
    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")],
) -> None:
    """Convert published weights to safetensors, without executing their pickle.

    Args:
        network: the published .pkl file
        weights: the .safetensors file to write
    """
    config = convert(network, weights)
    print(f"{weights}: {config}")


def cli(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. None means the arguments of the process."""
    tyro.cli(main, prog=program("tvm_ref.convert"), args=arguments)


if __name__ == "__main__":
    sys.exit(ending.run(cli))
