"""Settings of a training run: frozen dataclasses, saved as JSON with every checkpoint."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..data.dataset import DataConfig
from ..data.untrusted import read_settings, shown
from ..finite import require_finite
from ..model.config import DiTConfig
from ..model.power_ema import NARROWEST, WIDEST
from ..objective.loss import LossConfig
from ..objective.time_sampling import TimeConfig

T = TypeVar("T")
MOST_STEPS = 99_999_999  # names of checkpoints have eight digits; also of other counts
MOST = {"threads": 1024, "loss_bins": 10_000}


class ConfigError(ValueError):
    """A setting is invalid, or does not match another one."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of AdamW, the learning rate, and the two EMAs of the weights.

    Raises:
        ConfigError: for a value out of range.
    """

    lr: float = 1e-4  # largest learning rate
    schedule: Literal["constant", "cosine", "inverse-sqrt"] = "constant"  # how it falls: not, to 0 at run.steps, or
    # as lr / sqrt(step / decay_steps) after decay_steps (EDM2)
    decay_steps: int = 70_000  # inverse-sqrt only: steps at the largest learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates of the two moments, such as 0.9,0.95
    eps: float = 1e-8  # AdamW's eps, added to the root of the second moment
    weight_decay: float = 0.0  # decoupled weight decay, multiplied by the learning rate
    clip: float | None = None  # largest norm of the whole gradient; None: no clipping
    warmup_steps: int = 0  # steps over which the learning rate rises linearly to lr
    target_ema: float = 0.99  # EMA decay of the target network in the loss
    ema: float = 0.9999  # EMA decay of the weights that samples are drawn with

    def __post_init__(self) -> None:
        require_finite(self, "optim.")
        _require(self.lr > 0, "optim.lr", "more than 0", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "two numbers in [0, 1)", self.betas)
        _require(self.eps > 0, "optim.eps", "more than 0", self.eps)
        _require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        _require(self.clip is None or self.clip > 0, "optim.clip", "more than 0, or None", self.clip)
        _require_count("optim.warmup_steps", 0, self.warmup_steps)
        _require_count("optim.decay_steps", 1, self.decay_steps)
        for name in ("target_ema", "ema"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", "a number in [0, 1)", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Post-hoc EMA: averages from which `python -m tvm_ref.ema` makes one of any length (model/power_ema.py).

    Raises:
        ConfigError: for a value out of range.
    """

    sigma_rels: tuple[float, float] | None = None  # relative widths of two more averages, such as 0.05,0.1; None: none
    every: int = 1000  # steps between snapshots of them in the folder ema
    precision: Literal["float16", "float32"] = "float16"  # in which snapshots are stored

    def __post_init__(self) -> None:
        require_finite(self, "ema.")
        widths = self.sigma_rels or (WIDEST / 3, WIDEST / 2)
        expected = f"two numbers from {NARROWEST:g} to less than {WIDEST:.4g}, the smaller one first, or None"
        _require(NARROWEST <= widths[0] < widths[1] < WIDEST, "ema.sigma_rels", expected, self.sigma_rels)
        _require_count("ema.every", 1, self.every)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run trains, on which hardware and precision, and what it writes.

    Raises:
        ConfigError: for a value out of range.
    """

    steps: int  # optimizer steps in total, counted from the start of the run
    batch: int  # global batch size: images of one step, over all processes and micro-batches
    out: str  # folder of the run, for checkpoints, metrics and samples; a run found there is resumed
    accumulate: int = 1  # gradient accumulation: micro-batches of each process in a step, to save memory
    # Precision of matrix products and attention: bfloat16 and float16 by autocast, float16 with the loss times 1024 in
    # the backward pass; tf32 is float32 in TF32, as far as the GPU has it; float8 is bfloat16 with the linear layers of
    # the blocks in float8 (extra float8)
    precision: Literal["float32", "tf32", "bfloat16", "float16", "float8"] = "float32"
    residual: Literal["float32", "bfloat16"] = "float32"  # type of residual stream; bfloat16 beside bfloat16, float8
    compile: bool = False  # torch.compile every block
    cuda_graph: bool = False  # launch forward and backward pass as one CUDA graph: one GPU, accumulate 1, no log_norms
    # Activation checkpointing: blocks keep their inputs (full), or also results of attention and products (selective)
    checkpointing: Literal["none", "full", "selective"] = "none"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with several processes: replicate the weights (ddp) or shard them (fsdp)
    context_parallel: int = 1  # processes that share the tokens of an image (ring attention); divides their number
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    threads: int = 0  # CPU threads of PyTorch; 0: PyTorch's own choice, which is slow for small networks
    seed: int = 0  # seed of the weights, the order of the data and all random draws
    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 3  # number of newest checkpoints to keep
    sample_every: int = 1000  # steps between sample grids
    async_checkpoints: bool = False  # write checkpoints in a thread while training goes on, from a copy in host memory
    log_every: int = 1  # steps between rows of metrics.csv, and of loss_by_t.csv
    log_norms: int = 0  # steps between rows of norms.csv, gradients and activations of every block; 0: none
    loss_bins: int = 0  # intervals of t for which loss_by_t.csv has the loss; 0: none
    wandb: str = ""  # project of Weights & Biases that gets the metrics, too
    profile: tuple[int, int] | None = None  # first,last step that torch.profiler traces; None: none
    memory_snapshot: int = 0  # step whose GPU allocations are recorded; 0: none
    resume: str = ""  # checkpoint, or folder of a run, to resume from, in place of the newest in the folder of the run
    init: str = ""  # converted weights (.safetensors), checkpoint or folder of a run that a new run starts from
    other_data: bool = False  # resume although the data set is not the one that the run began with
    vae: str = ""  # folder of a diffusers AutoencoderKL that decodes the latents of sample grids
    evaluate: bool = True  # evaluate the samples at the end of the run
    evaluate_every: int = 0  # steps between evaluations of samples while it trains, in evaluations.csv; 0: none
    evaluate_samples: int = 0  # samples of such an evaluation; 0: 2048 points, 1797 digits or 5000 images
    inception: str = ""  # archive only, as are the next four, and as for tvm_ref.evaluate: Inception network for FID
    reference: str = ""  # reference statistics for FID
    features: str = ""  # safetensors file of a DINOv2 vision transformer for fd_vit
    features_reference: str = ""  # reference statistics for fd_vit
    reference_images: str = ""  # zip file or folder of real RGB images, for precision, recall and distances

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulate", "context_parallel", "save_every", "keep", "sample_every", "log_every")
        for name in counts:
            _require_count(f"run.{name}", 1, getattr(self, name))
        for name in ("threads", "log_norms", "loss_bins", "memory_snapshot", "evaluate_every", "evaluate_samples"):
            _require_count(f"run.{name}", 0, getattr(self, name), MOST.get(name, MOST_STEPS))
        one_pass = self.accumulate == 1 and self.log_norms == 0  # which a graph is of, and hooks do not run in it
        _require(not self.cuda_graph or one_pass, "run.cuda_graph", "False with run.accumulate or run.log_norms", True)
        narrow, expected = self.residual == "bfloat16", f"float32 with precision {self.precision}"
        _require(not narrow or self.precision in ("bfloat16", "float8"), "run.residual", expected, self.residual)
        _require(self.evaluate_samples != 1, "run.evaluate_samples", "at least 2, or 0", 1)
        first, last = self.profile or (1, 1)
        _require(1 <= first <= last, "run.profile", "two steps, the first at least 1, or None", self.profile)
        _require(0 <= self.seed < 2**32, "run.seed", "a number in [0, 2^32)", self.seed)
        _require(bool(self.out), "run.out", "a folder", self.out)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. Raises ConfigError for settings that do not match each other."""

    model: DiTConfig
    data: DataConfig
    run: RunConfig
    loss: LossConfig = field(default_factory=LossConfig)
    times: TimeConfig = field(default_factory=TimeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        for name, value in _flat(dataclasses.asdict(self)).items():
            if isinstance(value, str) and not _is_utf8(value):
                _require(False, name, "text in UTF-8 without null characters", value)
        guided = self.loss.w != 1 or self.loss.w_random is not None
        _require(
            self.model.guidance or self.loss.w_random is None,
            "model.guidance",
            "True, the network's input of the guidance scale, where loss.w_random draws it",
            self.model.guidance,
        )
        _require(
            self.model.num_classes > 0 or not guided,
            "loss.w",
            "1 (and no w_random) for a network without classes, which has nothing to be guided to",
            self.loss.w if self.loss.w_random is None else self.loss.w_random,
        )


def _is_utf8(text: str) -> bool:
    """Whether text can be stored in files of settings, and used as a path."""
    return "\0" not in text and text.encode(errors="replace").decode() == text


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


def _require_count(name: str, least: int, got: int, most: int = MOST_STEPS) -> None:
    _require(got >= least, name, f"at least {least}", got)
    _require(got <= most, name, f"at most {most}", got)


# Settings that may change when a run is resumed, because they do not change the results of a step.
FREE = frozenset(
    f"run.{name}"
    for name in (
        "steps", "out", "accumulate", "context_parallel", "compile", "cuda_graph", "checkpointing", "parallel",
        "device", "save_every", "keep", "sample_every", "threads", "resume", "init", "other_data", "vae", "evaluate",
        "async_checkpoints", "log_norms", "loss_bins", "wandb", "profile", "memory_snapshot", "evaluate_every",
        "evaluate_samples", "inception", "reference", "features", "features_reference", "reference_images",
    )
) | {"data.path", "data.max_bad", "ema.every", "ema.precision"}  # fmt: skip


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Lists the settings that must not change when a run is resumed, but did: "optim.lr: 0.001 before, 0.0001 now"."""
    before, now = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    is_cosine = new.optim.schedule == "cosine"  # its learning rates depend on the number of steps
    return [
        f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and (name not in FREE or (name == "run.steps" and is_cosine))
    ]


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes `config` as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Reads what save_config wrote. Raises ConfigError, naming the file, for anything else."""
    try:
        content = read_settings(path)
    except ValueError as error:
        raise ConfigError(f"{path} is no training configuration: {error}") from error
    return config_of(content, path)


def config_of(content: Any, path: Path) -> TrainConfig:
    """Builds the configuration from parsed JSON, read from `path`. Raises ConfigError, naming the file."""
    try:
        return _build(TrainConfig, content, "")
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} is no training configuration: {error}") from error


def _build(kind: type[T], values: Any, where: str) -> T:
    """Builds the dataclass `kind` from nested dicts. Missing, unknown and wrongly typed fields are refused."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    names = set(fields)
    if isinstance(values, dict):  # settings that came later are at their defaults in a file from before
        values = _defaults(fields) | values
    if not isinstance(values, dict) or values.keys() != names:
        got = sorted(map(shown, values))[:30] if isinstance(values, dict) else shown(values)
        raise ConfigError(f"{where or 'the file'}: expected the fields {sorted(names)}, got {got}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in values.items()})


def _defaults(fields: dict[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """The defaults of fields, as in a file: groups of settings are dicts."""
    found = {}
    for name, of in fields.items():
        if of.default is not dataclasses.MISSING:
            found[name] = of.default
        elif of.default_factory is not dataclasses.MISSING:
            found[name] = dataclasses.asdict(of.default_factory())
    return found


def _value(hint: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to the type `hint`. Lists become tuples, and a float may be written as an integer."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _value(option, value, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_value(option, item, where) for option, item in zip(arguments, value, strict=True))
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool, types.NoneType) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: expected {_in_words(hint)}, got {shown(value)}")


def _in_words(hint: Any) -> str:
    """Describes what a setting of this type may be."""
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    return kinds[hint] if hint in kinds else " or ".join(map(_in_words, arguments))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
