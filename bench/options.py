"""The command line of `python -m bench.sweep`, and the cells that it asks for."""

import argparse
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

from flashjvp_commands import arguments as types
from flashjvp_commands import outputs
from flashjvp_commands.arguments import a_device, names_out_of
from flashjvp_commands.entry import program
from reports.schema import MASKS

from . import measure
from .cases import DTYPES, OPERATIONS, Case
from .peers import PEERS
from .presets import PRESETS
from .providers import BASELINE, PROVIDERS, SUBJECT


@dataclass(frozen=True)
class Defaults:
    """Sizes for a device: on a CPU the whole sweep at 8192 tokens ends within two minutes on two cores."""

    heads: int
    head_dim: int
    dtype: str
    modes: tuple[str, ...]
    cell_limit_s: float


DEFAULTS = {
    "cpu": Defaults(heads=1, head_dim=64, dtype="float32", modes=("fwd", "fwd+bwd"), cell_limit_s=120.0),
    "cuda": Defaults(heads=24, head_dim=128, dtype="bfloat16", modes=("fwd", "bwd", "fwd+bwd"), cell_limit_s=180.0),
}
DEFAULT_LENGTH = 8192
EPILOG = """\
modes: fwd is o and its tangent o_t; bwd the gradients of both, with both cotangents, in q, k, v and their
tangents; fwd+bwd both together. What a provider has only in part is measured under a name of its own: plain-fwd,
plain-bwd, plain-fwd+bwd are attention without a JVP (all that `plain` has; flashjvp has them too), approx-fwd is
o and a difference quotient in place of o_t.

Each provider runs in child processes of its own. An out-of-memory, a crash, a hang, a wrong result or what a
provider does not support is a row with its reason. Rows are written as they come; Ctrl-C keeps them, and
--resume continues. Ratios are taken within one run.

  examples, each after the name of the command:
  --seq 1024,4096,8192 --causal
  --preset paper --peer official=../tvm --compile-s 90 --out paper.csv
  --preset paper --providers math-compiled --out paper.csv --resume
"""


@dataclass(frozen=True)
class Cell:
    """One row to be: a provider on a case."""

    provider: str
    case: Case
    preset: str = ""


def parser() -> argparse.ArgumentParser:
    """The options; those that are lists are measured in every combination."""
    options = types.parser(
        program("bench.sweep"),
        "Time and memory of attention with its JVP, provider beside provider: a table, a CSV and a figure.",
        EPILOG,
    )
    _add_shapes(options.add_argument_group("shapes", "with --preset they choose among its shapes"))
    _add_what(options.add_argument_group("what is measured"))
    _add_run(options.add_argument_group("the run"))
    return options


def make_cells(options: argparse.Namespace, device: str) -> list[Cell]:
    """The rows to measure, provider by provider in the order that they are named: those of one share a process.

    Shape by shape on a CPU, where every cell has a process of its own, and where all providers share one.
    """
    entries = _preset_entries(options, device) if options.preset else _entries(options, DEFAULTS[device])
    entries = [(shape, options.modes or modes) for shape, modes in entries]

    by_shape = device == "cpu" or share_a_process(options)
    groups: dict[object, list[tuple[Case, tuple[str, ...]]]] = {}
    for shape, modes in entries:
        groups.setdefault(shape if by_shape else None, []).append((shape, modes))
    cells = [
        Cell(provider, _in_mode(shape, PROVIDERS[provider].mode_for(mode)), options.preset or "")
        for group in groups.values()
        for provider in _providers(options)
        for shape, modes in group
        for mode in modes
    ]
    return list(dict.fromkeys(cells))


def share_a_process(options: argparse.Namespace) -> bool:
    """Whether on a GPU one process measures all providers: those of a preset that says so."""
    preset = PRESETS.get(options.preset)
    return preset is not None and preset.together and set(_providers(options)) <= set(preset.providers)


def _in_mode(shape: Case, mode: str) -> Case:
    """Plain attention has no tangents to choose from."""
    if mode.startswith("plain-"):
        return replace(shape, mode=mode, tangents="qkv", cotangents="both")
    return replace(shape, mode=mode)


def _providers(options: argparse.Namespace) -> list[str]:
    """Those named, else the preset's or flashjvp and the baseline with every peer that has a path."""
    named = options.providers or (PRESETS[options.preset].providers if options.preset else (SUBJECT, BASELINE))
    return list(dict.fromkeys([*named, *(() if options.providers else options.peers)]))


def _entries(options: argparse.Namespace, default: Defaults) -> list[tuple[Case, tuple[str, ...]]]:
    combinations = itertools.product(
        options.dtype or [default.dtype],
        options.head_dim or [default.head_dim],
        options.heads or [default.heads],
        options.kv_heads or [None],
        options.batch or [1],
        options.mask or ["none"],
        options.seq or [DEFAULT_LENGTH],
    )
    return [
        (
            Case(
                mode="fwd",
                batch=batch,
                heads=heads,
                kv_heads=kv_heads or heads,
                queries=length,
                keys=length,
                head_dim=head_dim,
                dtype=dtype,
                causal=options.causal,
                mask=mask,
            ),
            default.modes,
        )
        for dtype, head_dim, heads, kv_heads, batch, mask, length in combinations
    ]


def _preset_entries(options: argparse.Namespace, device: str) -> list[tuple[Case, tuple[str, ...]]]:
    """The preset's shapes that have one of the sizes asked for, where any were."""
    names = {"seq": "queries"} | {name: name for name in ("heads", "kv_heads", "head_dim", "batch", "dtype", "mask")}
    entries = [
        (entry.shape, entry.modes)
        for entry in PRESETS[options.preset].entries(device)
        if all(getattr(entry.shape, field) in (getattr(options, name) or [getattr(entry.shape, field)])
               for name, field in names.items())
        and (entry.shape.causal or not options.causal)
    ]  # fmt: skip
    if not entries:
        raise ValueError(f"preset {options.preset} has no shape with these sizes")
    return entries


def _by_device(name: str) -> str:
    cpu, cuda = (getattr(DEFAULTS[device], name) for device in ("cpu", "cuda"))
    cpu, cuda = (",".join(value) if isinstance(value, tuple) else f"{value}" for value in (cpu, cuda))
    return f"default {cpu} on a CPU, {cuda} on a GPU"


def _of_measure(seconds: dict[str, float]) -> str:
    return f"default {seconds['cpu']:g} on a CPU, {seconds['cuda']:g} on a GPU"


def _add_shapes(group: argparse._ArgumentGroup) -> None:
    described = "; ".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())
    group.add_argument("--preset", choices=PRESETS, help=described)
    group.add_argument(
        "--seq",
        type=types.wholes(1),
        metavar="N,...",
        help=f"tokens, queries and keys alike (default {DEFAULT_LENGTH})",
    )
    group.add_argument("--batch", type=types.wholes(1), metavar="B,...", help="batch sizes (default 1)")
    group.add_argument("--heads", type=types.wholes(1), metavar="H,...", help=f"query heads ({_by_device('heads')})")
    group.add_argument(
        "--kv-heads", type=types.wholes(1), metavar="H,...", help="key and value heads (default as many as query heads)"
    )
    group.add_argument(
        "--head-dim", type=types.wholes(1), metavar="D,...", help=f"head dims ({_by_device('head_dim')})"
    )
    group.add_argument(
        "--dtype", type=names_out_of(DTYPES), metavar="TYPE,...", help=f"{', '.join(DTYPES)} ({_by_device('dtype')})"
    )
    group.add_argument("--causal", action="store_true", help="with the causal mask, aligned at the top left")
    group.add_argument(
        "--mask",
        type=names_out_of(MASKS),
        metavar="MASK,...",
        help="bool, additive: [N, N], 30 %% of the pairs forbidden at random; empty-rows: boolean, every third query "
        "has no key; none (default)",
    )


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--modes", type=names_out_of(OPERATIONS), metavar="MODE,...", help=f"see below ({_by_device('modes')})"
    )
    group.add_argument(
        "--providers",
        type=names_out_of(PROVIDERS),
        metavar="NAME,...",
        help=f"in this order, of {', '.join(PROVIDERS)} (default {SUBJECT},{BASELINE}, or the preset's, each --peer)",
    )
    group.add_argument(
        "--peer",
        dest="peers",
        type=_peer,
        action=_AddPeer,
        default={},
        metavar="NAME=PATH",
        help=f"where to import {', '.join(PEERS)} from: a checkout, or folders joined by '{os.pathsep}' where it needs "
        "packages that are not installed; without a path it must be installed",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", type=a_device, metavar="DEVICE", help="cpu, cuda, cuda:1 (default the GPU where there is one)"
    )
    group.add_argument(
        "--cell-limit-s", type=types.seconds, metavar="S", help=f"time limit of one row ({_by_device('cell_limit_s')})"
    )
    group.add_argument(
        "--repeat-s",
        type=types.seconds,
        metavar="S",
        help=f"repeat the calls of a row for so many seconds ({_of_measure(measure.BUDGET_S)}) after a warm-up of as "
        f"many at most ({_of_measure(measure.WARM_UP_S)}); less serves sweeps of many shapes",
    )
    group.add_argument(
        "--budget-s",
        type=types.seconds,
        metavar="S",
        help="begin no row after so many seconds; --resume measures what was left",
    )
    group.add_argument(
        "--compile-s",
        type=types.seconds,
        metavar="S",
        help="on a GPU: before measuring, compile what is to be measured in as many processes as there are cores, for "
        "at most so many seconds of the budget; saves minutes with peers or many shapes",
    )
    group.add_argument(
        "--out",
        type=outputs.path_with(".csv"),
        metavar="PATH",
        help=f"for the rows, which are appended: {outputs.HELP % '.csv'}; default "
        "reports/data/<machine>/sweep-<start>.csv",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the last run of --out (by default of the newest file of this machine): skip the rows it has",
    )


class _AddPeer(argparse.Action):
    """Collects NAME=PATH pairs in a dictionary, each name once."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        assert isinstance(values, tuple)
        name, paths = values
        found = getattr(namespace, self.dest)
        if name in found:
            raise argparse.ArgumentError(self, f"{name} was given twice: expected each once")
        setattr(namespace, self.dest, {**found, name: paths})


def _peer(text: str) -> tuple[str, list[str]]:
    name, _, joined = text.partition("=")
    if name not in PEERS or not joined:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a name out of {', '.join(PEERS)}")
    paths = [Path(path).resolve() for path in joined.split(os.pathsep) if path]
    for path in paths:
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"{name}: {path} is no folder")
    return name, [str(path) for path in paths]
