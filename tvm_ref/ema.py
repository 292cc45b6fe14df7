"""Makes averaged weights of any length from the snapshots of a run: `python -m tvm_ref.ema RUN --sigma-rel 0.1`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashjvp_commands import ending, outputs

from .arguments import check_out, parsed
from .data.safetensors_file import write_safetensors
from .data.safetensors_header import read_header
from .model.power_ema import Combination, Profile, combine, gamma_of
from .training.checkpoint import CheckpointError
from .training.converted import SETTINGS
from .training.files import write_atomically
from .training.snapshots import Snapshot, snapshots
from .unsuitable import UnsuitableError

LARGE_ERROR = 0.05  # of the profile, relative
WIDTH = "sigma_rel"  # the key in the metadata of a file of this command


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """Make averaged weights of any length after training (post-hoc EMA, Karras et al., arXiv 2312.02696).

    The run must have been trained with --ema.sigma-rels. What is written is a file for sample, evaluate and train
    --run.init.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    sigma_rel: float
    """Relative width of the average: standard deviation of its weights over the steps, divided by the last step."""
    step: int | None = None
    """Last step that is averaged, one of a snapshot; None: the newest."""
    out: Path = Path("weights.safetensors")
    """The .safetensors file to write. Only files that this command wrote are replaced."""

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)
        check_out(self.out, ".safetensors")


def average(
    run: Path, sigma_rel: float, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str], Combination]:
    """Combines the snapshots of a run up to `step` into an average of relative width `sigma_rel`.

    Returns float32 weights by name, summed in float64, the metadata of the file, and what was combined. Raises
    CheckpointError for a run without snapshots and for snapshots that do not belong together, UnsuitableError for a
    step without one.
    """
    found = snapshots(run)
    if not found:
        raise CheckpointError(f"no snapshots in {run}: expected the folder of a run with --ema.sigma-rels")
    steps = sorted({one.step for one in found})
    last = steps[-1] if step is None else step
    if last not in steps:
        raise UnsuitableError(f"step: expected one of {', '.join(map(str, steps))}, got {last}")
    used = [one for one in found if one.step <= last]
    how = combine([Profile(one.step, gamma_of(one.sigma_rel)) for one in used], Profile(last, gamma_of(sigma_rel)))
    headers = [read_header(one.path) for one in used]
    metadata = headers[-1].pop("__metadata__", {})
    if SETTINGS not in metadata:
        raise CheckpointError(f"{used[-1].path} holds no settings of its run: it is no snapshot")
    shapes = [_shapes(header) for header in headers]
    if odd := next((one for one, of in zip(used, shapes, strict=True) if of != shapes[-1]), None):
        raise CheckpointError(f"{odd.path} and {used[-1].path} are of different networks")
    return _combined(used, how), {SETTINGS: metadata[SETTINGS], WIDTH: repr(sigma_rel)}, how


def _shapes(header: dict[str, Any]) -> dict[str, list[int]]:
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _combined(used: Sequence[Snapshot], how: Combination) -> dict[str, Tensor]:
    """One tensor after the other, so that memory holds one of them in float64."""
    files = [safe_open(one.path, framework="pt") for one in used]
    weights = {}
    for name in files[0].keys():  # noqa: SIM118
        total = torch.zeros((), dtype=torch.float64)
        for factor, file in zip(how.factors.tolist(), files, strict=True):
            total = total + factor * file.get_tensor(name).double()
        weights[name] = total.float()
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(EmaSettings, "tvm_ref.ema", arguments)
        out = outputs.prepared(settings.out, "weights.safetensors", (".safetensors",), _is_ours)
        weights, metadata, how = average(settings.run, settings.sigma_rel, settings.step)
        write_atomically(out, lambda draft: write_safetensors(weights, draft, metadata))
    except outputs.OutputError as error:
        raise ending.unusable(f"out: {error}") from error
    except UnsuitableError as error:
        raise ending.unusable(error) from error
    except (OSError, ValueError, CheckpointError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    if how.error > LARGE_ERROR:
        print(f"the snapshots give this average only roughly: {how.error:.1%} of its profile", file=sys.stderr)
    print(f"written: {out} (of {len(how.factors)} snapshots; the profile is off by {how.error:.2g}, relatively)")


def _is_ours(path: Path) -> bool:
    try:
        return WIDTH in read_header(path).get("__metadata__", {})
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(ending.run(main))
