"""Converts published weights to safetensors: `python -m tvm_ref.convert network.pkl weights.safetensors`.

A published file is a pickle of a module. It contains the source code of the module's class, and unpickling executes
that code. Here nothing is executed: modules become inert `Record`s, the classes they name are neither imported nor
called, the source code is ignored, and only the tensors are kept.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from flashjvp_commands import ending, outputs

from .arguments import check_out, parsed
from .data.safe_pickle import PYTHON_2, Record, SafeUnpickler, UnsafePickleError, load
from .data.safetensors_file import write_safetensors
from .data.safetensors_header import read_header
from .data.untrusted import one_line, shown
from .model.config import MOST_BLOCKS
from .model.dit import DiT, DiTConfig
from .training.converted import as_metadata, check_network, named_settings
from .training.files import write_atomically

__all__ = ["ModuleUnpickler", "SafeUnpickler", "UnsafePickleError", "convert", "main", "network_config", "tensors_of"]

# Names that may become a record: classes of modules, of their settings and of the compiler (whose bound methods are
# pickled as calls of getattr), and the function that would execute the source code.
RECORDED = re.compile(
    r"torch\.nn\..*|torch\.device|torch\._dynamo\..*|torch\._TorchCompile\w*|torch_utils\.persistence\..*|timm\..*"
    r"|training\..*|omegaconf\..*|dnnlib\..*|typing\.Any|contextlib\.nullcontext|collections\.defaultdict"
    r"|builtins\.(getattr|dict|list|tuple|int|float|str|bool|object)"
)
METADATA = "dit_config"
TABLE = "y_embedder.embedding_table.weight"
# Tensors that the settings are inferred from, with their numbers of axes.
NEEDED = {"pos_embed": 3, "x_embedder.proj.weight": 4, "blocks.0.attn.q_norm.weight": 1, "blocks.0.mlp.fc1.weight": 2}
MOST_MODULES = 100_000
MOST_NAME = 1000  # characters


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


def convert(network: Path, weights: Path, settings: str | None = None) -> DiTConfig:
    """Writes the weights in the pickle `network` to the safetensors file `weights`, under the names of a `DiT`.

    Tensors keep their dtypes. The settings of the network are inferred from the weights, returned, and stored in the
    metadata; a `DiT` with them is checked to have exactly these names and shapes. The kinds of normalisation cannot be
    inferred, and are set to the defaults of `DiTConfig`. The file is either complete or absent.

    settings: a preset, or a config.json; kept in the metadata, for sampling, evaluation and training from the weights.

    Raises: UnsafePickleError for a pickle that is damaged or holds more than modules, tensors and plain containers;
    ValueError for one without weights, or with weights that are not those of a `DiT`, or not those of `settings`.
    """
    given = None if settings is None else named_settings(settings)
    contents = load(network, ModuleUnpickler)
    try:
        tensors = tensors_of(contents, most_bytes=network.stat().st_size)
        config = network_config(tensors)
    except ValueError as error:
        raise ValueError(f"{network}: {error}") from error
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        name = differing[0]
        message = f"expected shape {expected.get(name)}, got {got.get(name)} ({len(differing)} such tensors)"
        raise ValueError(f"{network}: {name}: {message}; None = no such tensor")
    metadata = {METADATA: json.dumps(asdict(config))}
    if settings is not None and given is not None:
        check_network(config, given, settings)
        metadata |= as_metadata(given)
    write_atomically(weights, lambda draft: write_safetensors(tensors, draft, metadata))
    return config


def tensors_of(contents: Any, most_bytes: int) -> dict[str, Tensor]:
    """Returns the weights in what a `ModuleUnpickler` read: a module, a state dict, or a dict with one module.

    Names become those of a `DiT`: "_orig_mod." (from torch.compile) and the leading "model." are removed. Tensors that
    share memory are copied; together they may take `most_bytes`, the size of the file. Raises ValueError.
    """
    if isinstance(contents, dict):
        modules = {key: value for key, value in contents.items() if _module_state(value) is not None}
        if len(modules) > 1:
            raise ValueError(f"pickle: expected one module, got {sorted(map(str, modules))}")
        if modules:
            (contents,) = modules.values()
    named = contents if isinstance(contents, dict) else dict(_walk(contents))
    if not named:
        raise ValueError(f"pickle: expected a module or a state dict, got {shown(contents)}, without tensors")
    if odd := [(name, x) for name, x in named.items() if not (isinstance(name, str) and isinstance(x, Tensor))]:
        raise ValueError(f"pickle: expected a module or a state dict, got {shown(odd[0][0])} with {shown(odd[0][1])}")
    if (wanted := sum(tensor.numel() * tensor.element_size() for tensor in named.values())) > most_bytes:
        raise ValueError(f"pickle: expected weights of at most {most_bytes} bytes, as the file has, got {wanted}")
    plain = {name.replace("_orig_mod.", ""): tensor.contiguous().clone() for name, tensor in named.items()}
    outside = [name for name in plain if not name.startswith("model.")]
    if outside and len(outside) < len(plain):
        raise ValueError(f"pickle: expected every name to begin with model., or none, got {outside[0]}")
    return plain if outside else {name.removeprefix("model."): tensor for name, tensor in plain.items()}


def network_config(tensors: dict[str, Tensor]) -> DiTConfig:
    """Infers the settings of the network from its weights. Raises ValueError if a tensor needed for this is missing."""
    missing = [name for name in NEEDED if name not in tensors]
    if missing:
        raise ValueError(f"weights: expected those of a DiT with QK norm, got none named {missing[0]}")
    table = tensors.get(TABLE)
    for name, axes in NEEDED.items() | ({TABLE: 2} if table is not None else {}).items():
        shape = tensors[name].shape
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"weights: expected {name} with {axes} axes and some numbers, got {list(shape)}")
    position, patches, head, hidden = (tensors[name].shape for name in NEEDED)
    width, channels, patch = patches[0], patches[1], patches[2]
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if blocks != {str(i) for i in range(len(blocks))} or len(blocks) > MOST_BLOCKS:
        raise ValueError(f"weights: expected blocks numbered from 0 to at most {MOST_BLOCKS - 1}, got others")
    return DiTConfig(
        image_size=round(position[1] ** 0.5) * patch,
        channels=channels,
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=width // head[0],
        num_classes=0 if table is None else len(table) - 1,
        guidance="guidance_embedder.mlp.0.weight" in tensors,
        mlp_ratio=hidden[0] / width,
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
    is_module = isinstance(state, dict) and all(
        isinstance(state.get(name), dict) and all(isinstance(key, str) for key in state[name])
        for name in ("_parameters", "_buffers", "_modules")
    )
    return state if is_module else None


def _walk(module: Any) -> list[tuple[str, Tensor]]:
    """Lists names and tensors of a recorded module, like its state dict.

    Raises ValueError for more than `MOST_MODULES` modules, each counted as often as it is contained.
    """
    tensors: list[tuple[str, Tensor]] = []
    count, waiting = 0, [("", module)]
    while waiting:
        prefix, record = waiting.pop()
        if (count := count + 1) > MOST_MODULES or len(prefix) > MOST_NAME:
            raise ValueError(f"pickle: expected at most {MOST_MODULES} modules, not deeply nested, got more")
        if (state := _module_state(record)) is None:
            continue
        transient = state.get("_non_persistent_buffers_set")
        hidden = transient if isinstance(transient, set) else ()
        own = state["_parameters"] | {name: x for name, x in state["_buffers"].items() if name not in hidden}
        tensors += [(prefix + name, tensor) for name, tensor in own.items() if tensor is not None]
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(state["_modules"].items())]
    return tensors


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert published weights to safetensors, without executing their pickle."""

    network: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK")]
    """The published .pkl file."""
    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """The .safetensors file to write, or a folder for weights.safetensors. Only such files are replaced."""
    settings: str | None = None
    """Preset or config.json of the run, such as imagenet256-w2, which sampling and training need."""

    def __post_init__(self) -> None:
        check_out(self.weights, ".safetensors", option="weights")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. None means the arguments of the process."""
    try:
        given = parsed(ConvertConfig, "tvm_ref.convert", arguments)
        weights = outputs.prepared(given.weights, "weights.safetensors", (".safetensors",), _is_converted)
        config = convert(given.network, weights, given.settings)
    except outputs.OutputError as error:
        raise ending.unusable(f"weights: {error}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise SystemExit(f"error: {one_line(error)}") from error
    print(f"{weights}: {config}")


def _is_converted(path: Path) -> bool:
    try:
        return METADATA in read_header(path).get("__metadata__", {})
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(ending.run(main))
