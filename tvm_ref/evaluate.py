"""Measures the quality of a checkpoint's samples, such as FID: `python -m tvm_ref.evaluate CHECKPOINT --nfe 1,2,4`.

Several processes share the work: `torchrun --nproc-per-node 8 -m tvm_ref.evaluate ...`.
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from flashjvp_commands import ending, outputs, terminal
from flashjvp_commands.arguments import MOST

from .arguments import Numbers, check_common, check_guidance, check_out, parsed
from .data.dataset import open_dataset
from .data.fingerprint import digest_of_weights, fingerprint
from .data.toys import ToyName
from .model.dit import DiT
from .quality.evaluation import Evaluation, Sampling, evaluate_digits, evaluate_fashion, evaluate_squares, evaluate_toy
from .quality.images import ImageFiles, ImageJudge, evaluate_images, path_of_images
from .sampling.generate import guidance_scale, untrained
from .sampling.sampler import steps_of
from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.converted import load_model
from .training.parallel import World, leave, world_on
from .training.run_lock import RunLockedError
from .unfinished import Unfinished, beside, forget, is_delivered, together
from .unsuitable import UnsuitableError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare the samples of a checkpoint with its data, for each number of function evaluations (NFE).

    2-D toys: exact 2-Wasserstein distance to fresh points, with that between two fresh sets for reference. Digits:
    class accuracy, and squared Frechet distance on pixels in [0, 1]. Fashion: the same on features of a classifier that
    is trained first, and coverage. Archives: FID, and, given reference images,
    precision and recall, by the Inception weights; the same by a network of the DINOv2 family, whose Frechet distance
    is called fd_vit. All: cycle error x0 -> x_t -> x0.

    Of archives, what is finished is kept beside --out, also after Ctrl-C or kill -9. The same command goes on from
    there to the same results. With torchrun, several processes share the work.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, the folder of a run (its newest checkpoint), or converted weights (.safetensors)."""
    nfe: Numbers = (1, 2, 4)
    """NFE: numbers of function evaluations of the network for each sample, such as 1,2,4."""
    w: float | None = None
    """Guidance scale; None: that of training."""
    samples: int | None = None
    """Number of samples; None: 2048 points or squares, 1797 digits (as many as there are real ones), 10000 images of
    fashion or 50000 of an archive."""
    seed: int = 0
    """Seed of noise and labels: the same seed gives the same results."""
    batch: int = 256
    """Batch size of sampling."""
    weights: Literal["ema", "raw"] = "ema"
    """EMA weights (ema), or those of the last step (raw)."""
    inception: Path | None = None
    """Local file inception-2015-12-05.pt (archives only)."""
    reference: Path | None = None
    """Reference statistics for FID, .npz or plain .pkl with mu and sigma (archives only)."""
    features: Path | None = None
    """Local safetensors file of a DINOv2 vision transformer, for fd_vit; no code is run (archives only)."""
    features_reference: Path | None = None
    """Reference statistics for fd_vit, .npz or plain .pkl with mu and sigma (archives only)."""
    reference_images: Path | None = None
    """Zip file or folder of real RGB images, for precision, recall and distances (archives only)."""
    vae: Path | None = None
    """Folder of the diffusers AutoencoderKL that decodes latents (archives of latents only)."""
    save_images: Path | None = None
    """Zip file or new folder for the samples; with several NFEs, one for each: NAME-nfe-2.zip (archives only)."""
    data: str | None = None
    """Path of the training archive, or of the files of fashion; None: the path used in training."""
    out: Path | None = None
    """JSON file for the results, or a folder for quality.json; folders are made, and only such files replaced."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the networks run on: cpu, cuda, cuda:1. With torchrun, cuda is a GPU for each process."""

    def __post_init__(self) -> None:
        check_common(device=self.device, seed=self.seed, batch=self.batch)
        for nfe in self.nfe:
            check_common(device=self.device, nfe=nfe)
        check_guidance(self.w)
        if self.samples is not None and not 2 <= self.samples <= MOST:
            raise ValueError(f"samples: expected at least 2 and at most {MOST}, got {self.samples}")
        if len(set(self.nfe)) < len(self.nfe):
            raise ValueError(f"nfe: expected each number once, got {','.join(map(str, self.nfe))}")
        if self.out is not None:
            check_out(self.out, ".json")
        if self.save_images is not None:
            check_out(self.save_images, ".zip", option="save_images")


Done = Callable[[Evaluation], None]
IMAGES, FASHION_IMAGES = 50_000, 10_000
LEAST = 4  # samples that have three neighbours each, but of archives
TRANSPORTED = ("squares", *typing.get_args(ToyName))
MOST_POINTS = 20_000  # the cost matrix of exact transport has the square of it, 3 GiB


def evaluate(model: DiT, config: TrainConfig, settings: EvaluateConfig) -> Evaluation:
    """Evaluates `model`, trained with `config`, in this process alone, which keeps nothing if it is stopped.

    Raises UnsuitableError for settings that do not match the network.
    """
    results: list[Evaluation] = []
    alone = World(0, 1, next(model.parameters()).device)
    evaluate_together(model, config, dataclasses.replace(settings, out=None), alone, results.append)
    return results[0]


def evaluate_together(
    model: DiT,
    config: TrainConfig,
    settings: EvaluateConfig,
    world: World,
    done: Done,
    *,
    stop: Callable[[], bool] = lambda: False,
    scratch: Path | None = None,
) -> None:
    """Evaluates `model`, trained with `config`, with the processes of `world`, all of which call this.

    done: gets the result, in the first process, before the kept parts are removed.
    stop: asked before each part of an archive's evaluation; if any process says so, it is given up, without a result.
    scratch: parts lie beside this path and are not kept; None: they lie beside settings.out and are.

    Raises UnsuitableError for settings that do not match the network.
    """
    w = guidance_scale(config.loss, model.config.guidance, settings.w)
    if world.first and (warning := untrained(config.loss, w)):
        print(warning, file=sys.stderr)
    kind = steps_of(config.loss.objective)
    sampling = Sampling(w=w, scaled=config.loss.scaled, seed=settings.seed, batch=settings.batch, kind=kind)
    if config.data.name == "archive":
        _evaluate_archive(model, config, settings, sampling, world, done, stop, scratch)
        return
    archive_only = [*(field.name for field in dataclasses.fields(ImageFiles)), "save_images"]
    if config.data.name != "fashion":
        archive_only.append("data")
    if given := [name for name in archive_only if getattr(settings, name) is not None]:
        raise UnsuitableError(
            f"{', '.join(given)}: only for networks of archives, and this one is of {config.data.name}"
        )
    check_samples(config, settings.samples)
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not world.first and not is_sharded:  # it takes seconds, so one process is enough
        return
    if config.data.name == "digits":
        result = evaluate_digits(model, settings.nfe, settings.samples or 1797, sampling)
    elif config.data.name == "squares":
        result = evaluate_squares(model, settings.nfe, settings.samples or 2048, sampling)
    elif config.data.name == "fashion":
        data = dataclasses.replace(config.data, path=settings.data or config.data.path)
        result = evaluate_fashion(model, data, settings.nfe, settings.samples or FASHION_IMAGES, sampling)
    else:
        result = evaluate_toy(model, config.data.name, settings.nfe, settings.samples or 2048, sampling)
    if world.first:
        done(result)


def check_samples(config: TrainConfig, samples: int | None) -> None:
    """Raises UnsuitableError for a number of samples that the figures of this data set cannot be computed of."""
    name = config.data.name
    most = MOST_POINTS if name in TRANSPORTED else MOST
    if samples is not None and name != "archive" and not LEAST <= samples <= most:
        raise UnsuitableError(f"samples: expected from {LEAST} to {most} for a network of {name}, got {samples}")


def image_judge(config: TrainConfig, settings: EvaluateConfig, device: torch.device) -> ImageJudge:
    """Loads what the samples of a network of an archive are judged with. Raises as `ImageJudge`."""
    files = ImageFiles(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(ImageFiles)})
    return ImageJudge(files, config.data, settings.samples or IMAGES, device)


def _evaluate_archive(
    model: DiT, config: TrainConfig, settings: EvaluateConfig, sampling: Sampling, world: World, done: Done,
    stop: Callable[[], bool], scratch: Path | None,
) -> None:  # fmt: skip
    data = dataclasses.replace(config.data, path=settings.data or config.data.path)
    count, save = settings.samples or IMAGES, settings.save_images
    judge = image_judge(config, settings, next(model.parameters()).device)
    kept: dict[str, Any] = {}
    if scratch is None:
        kept = {
            "network": digest_of_weights(model), **asdict(sampling), "samples": count, "saves images": save is not None,
            **{f"data.{name}": value for name, value in fingerprint(open_dataset(data)).items()},
            **judge.fingerprint(),
        }  # fmt: skip
    out = settings.out
    if together(world, lambda: scratch is None and out is not None and forget(out, kept)):
        if world.first:
            print(f"the evaluation was complete when the command was killed: {out}")
        return
    if save is not None:
        for path in (path_of_images(save, nfe, settings.nfe) for nfe in settings.nfe):
            if out is None or not is_delivered(beside(out), path):
                try:
                    outputs.new(path)
                except outputs.OutputError as error:
                    raise UnsuitableError(f"save_images: {error}") from error
    with Unfinished(scratch or settings.out, kept, world, lasts=scratch is None) as work:
        result = evaluate_images(model, data, settings.nfe, count, sampling, judge, work, world, save=save, stop=stop)
        if result is not None:
            done(result)
            work.remove()


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Prints the results as a table, with a row for each NFE."""
    names = list(evaluation.by_nfe[next(iter(evaluation.by_nfe))])
    table = Table(title=f"{evaluation.samples} samples")
    for name in ("NFE", *names):
        table.add_column(name, justify="right")
    for nfe, figures in evaluation.by_nfe.items():
        table.add_row(str(nfe), *(f"{figures[name]:.4g}" for name in names))
    console.print(terminal.Fitted(table))
    for name, value in evaluation.context.items():
        console.print(f"{name}: {value:.4g}")


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Writes the results as JSON. The file appears under its name once it is complete."""
    content = {"samples": evaluation.samples, "nfe": evaluation.by_nfe, "context": evaluation.context}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(EvaluateConfig, "tvm_ref.evaluate", arguments)
        ours = outputs.starts_with(b'{\n  "samples": ')
        out = None if settings.out is None else outputs.prepared(settings.out, "quality.json", (".json",), ours)

        def done(evaluation: Evaluation) -> None:
            print_table(evaluation, Console())
            if out is not None:
                write_json(evaluation, out)

        with world_on(settings.device) as this:
            loaded = load_model(settings.checkpoint, device=this.device, weights=settings.weights)
            evaluate_together(loaded.model, loaded.config, dataclasses.replace(settings, out=out), this, done)
    except outputs.OutputError as error:
        raise ending.unusable(f"out: {error}") from error
    except UnsuitableError as error:
        raise ending.unusable(error) from error
    except (OSError, ValueError, CheckpointError, RunLockedError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    leave(ending.run(main))
