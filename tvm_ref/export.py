"""Writes a network as a folder for others: `python -m tvm_ref.export CHECKPOINT --out FOLDER`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from flashjvp_commands import ending, extras, outputs

from .arguments import parsed
from .training.checkpoint import CheckpointError
from .training.converted import load_model
from .training.exported import write_exported, write_whole


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a network as a folder in the style of the Hugging Face Hub, or for diffusers. No pickle is written.

    hub: model.safetensors, config.json and a model card, for tvm-sample, tvm-evaluate, tvm-train --run.init and
    tvm_ref.from_pretrained. diffusers: for tvm_ref.diffusers_model.TVMTransformer2DModel.from_pretrained.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, the folder of a run (its newest checkpoint), or converted weights (.safetensors)."""
    out: Path
    """The folder to write; its parents are made, and nothing is replaced."""
    layout: Literal["hub", "diffusers"] = "hub"
    """Files and names of the Hub, or those that diffusers expects."""
    weights: Literal["ema", "raw"] = "ema"
    """EMA weights (ema), or those of the last step (raw)."""

    def __post_init__(self) -> None:
        if str(self.out) in ("", ".") or "\0" in str(self.out) or self.out.suffix in (".safetensors", ".json", ".zip"):
            raise ValueError(f"out: expected the name of a folder, got {str(self.out)!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(ExportConfig, "tvm_ref.export", arguments)
        if settings.layout == "diffusers" and (text := extras.advice("latents")):
            raise SystemExit(text)
        settings = replace(settings, out=outputs.new(settings.out))
        loaded = load_model(settings.checkpoint, device=torch.device("cpu"), weights=settings.weights)
        if settings.layout == "hub":
            write_exported(settings.out, loaded.model, loaded.config)
        else:
            from .diffusers_model import TVMTransformer2DModel  # needs an extra

            write_whole(settings.out, TVMTransformer2DModel.of(loaded.model, loaded.config.loss).save_pretrained)
    except outputs.OutputError as error:
        raise ending.unusable(f"out: {error}") from error
    except (OSError, ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"network written to {settings.out}")


if __name__ == "__main__":
    sys.exit(ending.run(main))
