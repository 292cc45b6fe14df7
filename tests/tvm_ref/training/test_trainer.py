"""The files that a run writes into its folder, and how it is resumed."""

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.tvm_ref.runs import change, digits, toy, train
from tvm_ref.data.dataset import DataConfig
from tvm_ref.data.noise import indexed_normals
from tvm_ref.data.vae import load_vae
from tvm_ref.evaluate import EvaluateConfig, evaluate
from tvm_ref.model.dit import DiTConfig
from tvm_ref.objective.loss import LossConfig
from tvm_ref.sampling.grids import DENSITY_BINS, tiles, write_grid
from tvm_ref.sampling.sampler import sample
from tvm_ref.training.checkpoint import CheckpointError, checkpoints, load_model, read_step
from tvm_ref.training.parallel import world
from tvm_ref.training.report import MOST_IMAGES, PER_CLASS, SEED
from tvm_ref.training.trainer import Trainer


def rows(out: Path) -> list[str]:
    return (out / "metrics.csv").read_text().splitlines()[1:]


def test_a_run_leaves_metrics_checkpoints_grids_and_a_summary(tmp_path: Path) -> None:
    printed = train(toy(tmp_path, steps=5, sample_every=3, evaluate=True, log_every=2))
    assert [row.split(",")[0] for row in rows(tmp_path)] == ["2", "4"]
    assert [read_step(path) for path in checkpoints(tmp_path / "checkpoints")] == [2, 4, 5]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        f"step-0000000{step}-nfe-{nfe}.png" for step in (3, 5) for nfe in (1, 2, 4)
    }
    assert Image.open(tmp_path / "samples/step-00000003-nfe-1.png").size == (DENSITY_BINS, DENSITY_BINS)
    assert list((tmp_path / "tensorboard").iterdir())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["nfe"]) == {"1", "2", "4"}
    assert all(figures["w2"] > 0 for figures in summary["nfe"].values())
    assert "w2_fresh" in printed and "done: 5 steps" in printed


def test_a_finished_run_that_goes_on_has_no_figures_until_it_ends_again(tmp_path: Path) -> None:
    """Else those of the earlier end would be taken for those of a run that was stopped."""
    config = toy(tmp_path, steps=1, evaluate=True)
    train(config)
    earlier = (tmp_path / "summary.json").read_bytes()
    train(config)
    assert (tmp_path / "summary.json").read_bytes() == earlier  # nothing was left to do
    with world("cpu") as this:
        longer = Trainer(change(config, steps=99), this, Console(file=io.StringIO()))
        longer.signal = signal.SIGTERM
        assert not longer.run()
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "aside-summary.json").read_bytes() == earlier
    train(change(config, steps=3))
    assert json.loads((tmp_path / "summary.json").read_text()) != json.loads(earlier)


def test_grids_of_classes_have_a_row_for_each(tmp_path: Path) -> None:
    train(digits(tmp_path, steps=1))
    grids = [np.asarray(Image.open(tmp_path / f"samples/step-00000001-nfe-{nfe}.png")) for nfe in (1, 2, 4)]
    assert all(grid.shape == grids[0].shape and grid.shape[0] == grid.shape[1] for grid in grids)


def test_grids_of_latents_are_decoded(tmp_path: Path) -> None:
    from diffusers.models.autoencoders import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    (tmp_path / "latents").mkdir()
    for i in range(2):
        np.save(tmp_path / f"latents/{i}.npy", np.full((8, 4, 4), 1 + i, np.float32))
    config = toy(tmp_path / "run", steps=1, batch=2, vae=str(tmp_path / "vae"))
    network = DiTConfig(image_size=4, channels=4, width=8, depth=1, heads=1, guidance=False)
    data = DataConfig(name="archive", path=str(tmp_path / "latents"), latents="imagenet256")
    train(dataclasses.replace(config, model=network, data=data))
    model = load_model(tmp_path / "run", device=torch.device("cpu")).model
    vae = load_vae(tmp_path / "vae", torch.device("cpu"))
    noise = indexed_normals(SEED, range(MOST_IMAGES), (4, 4, 4))
    for nfe in (1, 2, 4):
        samples = sample(model, noise, torch.zeros(MOST_IMAGES, dtype=torch.int64), 1.0, nfe, True, guidance=False)
        write_grid(tmp_path / "expected.png", tiles(samples, "imagenet256", vae), columns=PER_CLASS)
        shown, expected = (tmp_path / f"run/samples/step-00000001-nfe-{nfe}.png", tmp_path / "expected.png")
        assert shown.read_bytes() == expected.read_bytes()


def test_the_figures_of_random_guidance_are_those_of_its_strongest(tmp_path: Path) -> None:
    config = digits(tmp_path, steps=1, evaluate=True)
    train(dataclasses.replace(config, loss=LossConfig(w_random=(1.0, 3.0))))
    trained = load_model(tmp_path, device=torch.device("cpu"))
    strongest = evaluate(trained.model, trained.config, EvaluateConfig(checkpoint=tmp_path, nfe=(1,), w=3.0))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["nfe"]["1"] == strongest.by_nfe[1]
    assert summary["samples"] == strongest.samples


def test_a_longer_run_repeats_the_shorter_one(tmp_path: Path) -> None:
    train(digits(tmp_path / "short", steps=3))
    train(digits(tmp_path / "long", steps=5))
    assert rows(tmp_path / "long")[:3] == rows(tmp_path / "short")
    assert "resuming from" in train(digits(tmp_path / "short", steps=5))
    assert rows(tmp_path / "long") == rows(tmp_path / "short")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = toy(tmp_path, steps=2)
    train(config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "events" not in path.name}
    assert "done: 2 steps" in train(config)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "events" not in path.name}
    assert after == before


def test_going_back_to_an_earlier_checkpoint_when_the_newest_is_damaged(tmp_path: Path) -> None:
    config = toy(tmp_path / "run")
    train(config)
    whole = rows(tmp_path / "run")
    earlier, damaged = checkpoints(tmp_path / "run/checkpoints")[-2:]
    (damaged / "config.json").write_text("")
    with pytest.raises(CheckpointError, match=rf"config\.json has 0 bytes .*--run\.resume {earlier}\)"):
        train(config)
    assert rows(tmp_path / "run") == whole
    train(change(config, resume=str(earlier), steps=7))
    assert rows(tmp_path / "run") == whole[:7]
    assert [read_step(path) for path in checkpoints(tmp_path / "run/checkpoints")][-1] == 7
    assert (damaged.parent / f"aside-{damaged.name}").is_dir()
    train(config)
    assert rows(tmp_path / "run") == whole
    train(change(config, resume=str(earlier), steps=7))  # a second time
    assert (damaged.parent / f"aside-2-{damaged.name}").is_dir()


def test_a_run_can_go_on_in_another_folder(tmp_path: Path) -> None:
    train(toy(tmp_path / "one", steps=4))
    train(toy(tmp_path / "one", steps=6))
    start = checkpoints(tmp_path / "one/checkpoints")[1]
    train(toy(tmp_path / "two", steps=6, resume=str(start)))
    step = read_step(start)
    assert rows(tmp_path / "two") == rows(tmp_path / "one")[step:]
    shutil.rmtree(tmp_path / "one")
    train(toy(tmp_path / "two", steps=8))


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=4))
    whole = rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    train(toy(tmp_path, steps=4))
    assert rows(tmp_path) == whole


def test_a_checkpoint_to_go_on_from_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.resume: expected an existing path, got .*elsewhere"):
        train(toy(tmp_path, resume=str(tmp_path / "elsewhere")))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is damaged: manifest\.json cannot be read"):
        train(toy(tmp_path, resume=str(tmp_path / "file")))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_goes_on_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole = digits(tmp_path / "whole", device="cuda", precision=precision, checkpointing="selective", accumulate=2)
    train(whole)
    for steps in (3, 8):
        train(change(whole, out=str(tmp_path / "parts"), steps=steps))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
