"""`sample`: reproducible samples, their PNG files, and the command."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tvm_ref import sample as command
from tvm_ref.data.archive import ImageArchive
from tvm_ref.data.dataset import DataConfig
from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.objective.loss import LossConfig
from tvm_ref.sample import labels_of_rows
from tvm_ref.sampling.generate import generate, guidance_scale, untrained
from tvm_ref.sampling.grids import GAP, tiles, to_uint8, write_grid
from tvm_ref.training.checkpoint import ALONE, save
from tvm_ref.training.config import RunConfig, TrainConfig


def random_network(config: DiTConfig, seed: int = 0) -> DiT:
    """A network with random weights throughout. With the initial ones, F = 0, and samples would be noise."""
    model = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.1, generator=generator)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_network(DiTConfig(image_size=8, channels=1, patch=4, width=16, depth=1, heads=2, num_classes=10))


def draw(model: DiT, labels: list[int], **others: float) -> torch.Tensor:
    arguments = {"w": 2.0, "steps": 1, "scaled": True, "seed": 0, "batch": 4} | others
    return torch.cat(list(generate(model, torch.tensor(labels), **arguments)))


def test_a_sample_depends_on_its_number_label_seed_guidance_and_steps(model: DiT) -> None:
    x = draw(model, [3] * 6)
    assert x.shape == (6, 1, 8, 8) and x.dtype == torch.float32 and len(x.unique(dim=0)) == 6
    assert torch.equal(x, draw(model, [3] * 6))
    # Matrix products over other numbers of rows may round differently, so equal batches are compared bit by bit.
    assert torch.equal(x[:4], draw(model, [3] * 4))
    for other in ({"seed": 1}, {"w": 1.5}, {"steps": 2}, {"scaled": False}):
        changed = draw(model, [3] * 4, **other)
        assert all(not torch.equal(a, b) for a, b in zip(x, changed, strict=False))
    assert not torch.equal(draw(model, [4] * 4), x[:4])


def test_batches_start_from_the_same_noise(model: DiT) -> None:
    noise = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.weight = model.config, torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, s, labels, beta):
            noise.append((x, labels))
            return torch.zeros_like(x)

    labels = torch.arange(7)
    for batch in (7, 3, 2):
        noise.clear()
        list(generate(Spy(), labels, w=1.0, steps=1, scaled=True, seed=5, batch=batch))
        assert [len(x) for x, _ in noise][:-1] == [batch] * (len(noise) - 1)
        together = torch.cat([x for x, _ in noise])
        first = together if batch == 7 else first  # noqa: F821
        assert torch.equal(together, first) and torch.equal(torch.cat([l for _, l in noise]), labels)


@pytest.mark.parametrize(("labels", "batch"), [([11], 1), ([-1], 1), ([], 1), ([1], 0)])
def test_what_cannot_be_sampled_is_refused(labels: list[int], batch: int, model: DiT) -> None:
    with pytest.raises(ValueError, match="expected"):
        draw(model, labels, batch=batch)


def test_the_guidance_scale_is_one_that_the_network_can_follow() -> None:
    constant, random = LossConfig(w=1.5), LossConfig(w_random=(1.0, 2.0))
    assert guidance_scale(constant, True, None) == guidance_scale(constant, False, None) == 1.5
    assert guidance_scale(constant, True, 1.5) == 1.5 and guidance_scale(random, True, 1.2) == 1.2
    assert guidance_scale(constant, True, 1.2) == 1.2 and guidance_scale(random, True, 2.5) == 2.5
    assert untrained(constant, 1.5) is untrained(random, 1.0) is untrained(random, 2.0) is None
    assert "trained with w = 1.5," in untrained(constant, 1.2) and "w = 2.5" in untrained(random, 2.5)
    for config, guidance_input, w in ((constant, False, 2.0), (constant, True, 0.0), (random, True, math.inf)):
        with pytest.raises(ValueError, match="got"):
            guidance_scale(config, guidance_input, w)
    with pytest.raises(ValueError, match="expected w from 1"):
        guidance_scale(random, True, None)


def test_rows_of_a_grid_are_classes() -> None:
    assert labels_of_rows(10, (3, 0), 2).tolist() == [3, 3, 0, 0]
    assert labels_of_rows(3, None, 1).tolist() == [0, 1, 2] and len(labels_of_rows(1000, None, 4)) == 40
    assert labels_of_rows(0, None, 3).tolist() == [0, 0, 0]
    for arguments in ((10, (10,), 2), (10, (-1,), 2), (0, (0,), 2), (10, (1,), 0)):
        with pytest.raises(ValueError, match=r"classes|per_class"):
            labels_of_rows(*arguments)


def test_pictures_of_images_are_clipped_and_enlarged() -> None:
    grey = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])[None, None]
    picture = tiles(grey)
    assert picture.dtype == torch.uint8 and picture.shape == (1, 3, 32, 32)
    assert picture[0, 1, ::16, ::16].tolist() == [[0, 128], [255, 255]] and picture[0, 0, 15, 15] == 0
    colour = torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.equal(tiles(colour), (colour * 127.5 + 127.5).round().to(torch.uint8))
    for bad in (torch.zeros(1, 2, 8, 8), torch.zeros(8, 8), torch.full((1, 1, 8, 8), torch.nan)):
        with pytest.raises(ValueError, match="expected"):
            tiles(bad)


def test_points_in_sets_are_shown_like_points() -> None:
    points = torch.randn(40, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    sets = points.view(10, 4, 2).transpose(1, 2).reshape(10, 2, 2, 2)
    assert torch.equal(tiles(points), tiles(sets))


def test_pictures_of_points_have_y_upwards() -> None:
    points = torch.tensor([[2.9, 2.9], [-2.9, 2.9], [-2.9, 2.9]])[:, :, None, None]
    picture = tiles(points)
    assert picture.shape == (1, 3, 128, 128)
    lit = picture[0, 0].nonzero().tolist()
    assert len(lit) == 2 and all(row < 5 for row, _ in lit) and picture[0, 0, lit[0][0], lit[0][1]] == 255


def test_pictures_of_latents_without_an_autoencoder() -> None:
    latents = torch.zeros(2, 4, 32, 32)
    latents[:, 0], latents[:, 3] = 3.0, torch.nan
    assert tiles(latents, "imagenet256")[0, :, 0, 0].tolist() == [255, 128, 128]


def test_a_grid_is_written_row_by_row_and_at_once(tmp_path: Path) -> None:
    pictures = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 6, 4) * 10
    write_grid(tmp_path / "grid.png", pictures, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (12 + GAP, 12 + 2 * GAP, 3)
    assert [[int(sheet[r * (6 + GAP) + 5, c * (4 + GAP) + 3, 0]) for c in range(3)] for r in range(2)] == [
        [0, 10, 20],
        [30, 40, 255],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    for bad, columns in ((pictures.float(), 3), (pictures[:0], 3), (pictures, 0), (pictures[:, :1], 1)):
        with pytest.raises(ValueError, match="expected pictures"):
            write_grid(tmp_path / "bad.png", bad, columns)
    with pytest.raises(FileNotFoundError):
        write_grid(tmp_path / "none" / "grid.png", pictures, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def save_run(folder: Path, model: DiT, data: DataConfig, loss: LossConfig) -> Path:
    config = TrainConfig(model=model.config, data=data, loss=loss, run=RunConfig(steps=1, batch=1, out=str(folder)))
    other = random_network(model.config, seed=1)
    tensors = {f"ema.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"network.{name}": value for name, value in other.state_dict().items()}
    return save(folder, 1, tensors, config, ALONE)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments), "--device", "cpu"])
    command.main()


def test_the_command(model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_run(tmp_path / "run", model, DataConfig(), LossConfig(w=1.5))
    options = (checkpoint, "--nfe", "1", "--w", "2", "--classes", "0,1,2", "--seed", "0", "--out")
    run(monkeypatch, *options, tmp_path / "grid.png")
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (8 * (32 + GAP) - GAP, 3 * (32 + GAP) - GAP)
    expected = tiles(draw(model, [0] * 8 + [1] * 8 + [2] * 8, batch=24))
    write_grid(tmp_path / "expected.png", expected, 8)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    run(monkeypatch, *options, tmp_path / "raw.png", "--weights", "raw")
    assert (tmp_path / "raw.png").read_bytes() != (tmp_path / "grid.png").read_bytes()


@pytest.mark.parametrize("name", ["images.zip", "images"])
def test_the_command_writes_images_that_can_be_read(
    name: str, model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_run(tmp_path / "run", model, DataConfig(), LossConfig(w=1.5))
    options = ("--classes", "3,1", "--per-class", "2", "--w", "2", "--out", tmp_path / name)
    run(monkeypatch, checkpoint, *options)
    assert capsys.readouterr().err.splitlines() == [untrained(LossConfig(w=1.5), 2.0)]
    images, labels = ImageArchive(tmp_path / name, 10).get(np.arange(4), torch.Generator())
    expected = draw(model, [3, 3, 1, 1], batch=4).expand(-1, 3, -1, -1)
    assert torch.equal((images * 127.5 + 127.5).round().byte(), to_uint8(expected)) and labels.tolist() == [3, 3, 1, 1]
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, checkpoint, *options)
    assert "exists already" in capsys.readouterr().err


def test_the_command_for_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig(image_size=1, channels=2, patch=1, width=16, depth=1, heads=2, guidance=False)
    checkpoint = save_run(tmp_path / "run", random_network(config), DataConfig(name="moons"), LossConfig(w=1.0))
    run(monkeypatch, checkpoint, "--out", tmp_path / "points.png", "--per-class", "100")
    assert Image.open(tmp_path / "points.png").size == (128, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "3,10"), "classes: expected numbers from 0 to 9"),
        (("--vae", "."), "not trained on latents"),
        (("--out", "pyproject.toml/all.png"), "File exists|Not a directory"),
    ],
)
def test_the_command_says_what_is_wrong(
    options: tuple[str, ...], message: str, model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checkpoint = save_run(tmp_path / "run", model, DataConfig(), LossConfig(w=1.5))
    out = () if "--out" in options else ("--out", tmp_path / "grid.png")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, checkpoint, *out, *options)
    assert re.search(f"error: .*{message}", capsys.readouterr().err + str(end.value))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("w", ["-1", "inf", "nan"])
def test_a_guidance_scale_that_is_none_is_said_in_one_line(
    w: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, "--w", w)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: w: expected a positive number") and said.count("\n") == 1


def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, "--out", "x.jpg")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: out: expected a file that ends with .png or .zip, or a folder, got x.jpg")
    assert said.count("\n") == 1


def test_the_command_names_a_checkpoint_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: no checkpoint in"):
        run(monkeypatch, tmp_path / "none")


def test_classes_are_numbers_with_commas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--classes", "0;1")
    assert "whole numbers separated by commas" in capsys.readouterr().err
