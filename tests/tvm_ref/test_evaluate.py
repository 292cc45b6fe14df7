"""`evaluate`: metrics of networks whose samples are known exactly, and the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tvm_ref import evaluate as command
from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.data.digits import real_digits
from tvm_ref.data.toys import toy_points
from tvm_ref.data.vae import load_vae
from tvm_ref.evaluate import EvaluateConfig, evaluate
from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.objective.loss import LossConfig
from tvm_ref.quality.evaluation import CYCLE_STEPS, Sampling, cycle_errors
from tvm_ref.quality.metrics import Moments, frechet_distance, precision_recall, wasserstein2
from tvm_ref.sampling.generate import generate
from tvm_ref.sampling.grids import decoded, to_uint8
from tvm_ref.training.checkpoint import ALONE, save
from tvm_ref.training.config import RunConfig, TrainConfig
from verify.budget.metric_tolerance import flow_bound, frechet_change, single_precision_bound

MOMENTS = Moments(torch.full((6,), 128.0, dtype=torch.float64), torch.eye(6, dtype=torch.float64) * 9)
CONTEXT = {"cycle_error_t0.25", "cycle_error_t0.5", "cycle_error_t1"}
FLOORS = [f"{figure}_bootstrap" for figure in ("frechet", "precision", "recall", "variance")]


class Known(torch.nn.Module):
    """x -> x + (s - t) F with F(x, t, s, label) given, where a DiT is expected."""

    def __init__(self, config: DiTConfig, F) -> None:
        super().__init__()
        self.config, self.anchor = config, torch.nn.Parameter(torch.zeros(()))
        self.F = F

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, beta: Tensor | None = None) -> Tensor:
        return self.F(x, t[:, None, None, None], s[:, None, None, None], labels)


def network(channels: int, size: int, num_classes: int) -> DiTConfig:
    return DiTConfig(image_size=size, channels=channels, patch=1, width=8, depth=1, heads=1, num_classes=num_classes)


def training(config: DiTConfig, data: DataConfig) -> TrainConfig:
    loss = LossConfig(w=1.0 if config.num_classes == 0 else 1.5, scaled=False)
    return TrainConfig(model=config, data=data, loss=loss, run=RunConfig(steps=1, batch=1, out="run"))


def settings(**fields: object) -> EvaluateConfig:
    return EvaluateConfig(checkpoint=Path("none"), device="cpu", **fields)


def test_digits_of_a_network_that_knows_one_digit_of_each_class() -> None:
    """F = (x - x0) / t leads to x0 in any number of steps: class accuracy 1, and a distance that can be computed."""
    real = real_digits()
    one_each = torch.from_numpy(np.stack([real.images[real.labels == digit][0] for digit in range(10)]))

    def to_digit(x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return (x - (2 * one_each[labels][:, None] - 1)) / t.clamp(min=0.1)

    config = network(1, 8, 10)
    model = Known(config, to_digit)
    result = evaluate(model, training(config, DataConfig()), settings(nfe=(1, 2)))
    assert result.samples == 1797 and list(result.by_nfe) == [1, 2]
    assert result.context.keys() == {"judge_accuracy", *FLOORS} | CONTEXT and result.context["judge_accuracy"] > 0.98
    assert all(np.isfinite(value) for value in result.context.values())
    samples = one_each[torch.from_numpy(real.labels)].flatten(1)
    exact = frechet_distance(samples, torch.from_numpy(real.images).flatten(1))
    bound = frechet_change(exact, 64, pixel_error=single_precision_bound(roundings=16, scale=7.0))  # noise and digits
    for figures in result.by_nfe.values():
        assert figures["accuracy"] == 1.0 and abs(figures["frechet"] - exact) <= bound


def test_digits_of_a_network_that_ignores_the_class() -> None:
    config = network(1, 8, 10)
    model = Known(config, lambda x, t, s, labels: x + 1)  # black images
    result = evaluate(model, training(config, DataConfig()), settings(nfe=(1,), samples=500))
    assert result.samples == 500 and result.by_nfe[1]["accuracy"] < 0.2 and result.by_nfe[1]["frechet"] > 1


def test_toys_are_compared_with_fresh_points() -> None:
    config = network(2, 1, 0)
    model = Known(config, lambda x, t, s, labels: x)  # x (1 + s - t): every sample at 0, in one step
    chosen = settings(nfe=(1, 2), samples=64)
    result = evaluate(model, training(config, DataConfig(name="eight_gaussians")), chosen)
    fresh = [torch.from_numpy(toy_points("eight_gaussians", 64, seed)) for seed in (1, 2)]
    assert result.by_nfe[1]["w2"] == wasserstein2(torch.zeros(64, 2), fresh[0])
    assert [result.by_nfe[1][figure] for figure in ("precision", "recall", "variance")] == [0, 0, 0]
    floors = precision_recall(fresh[1], fresh[0])
    assert (result.context["precision_fresh"], result.context["recall_fresh"]) == floors and min(floors) > 0.5
    assert 0.5 < result.context["variance_fresh"] < 2
    assert 0 < result.by_nfe[2]["w2"] != result.by_nfe[1]["w2"]
    assert result.context["w2_fresh"] == wasserstein2(fresh[1], fresh[0]) and result.samples == 64


def test_cycle_errors() -> None:
    """For a constant velocity, jumps are exact. If jumps do nothing, the error is the distance to x_t."""
    dataset, sampling = open_dataset(DataConfig(name="moons")), Sampling(w=1.0, scaled=False, seed=0, batch=8)
    straight = Known(network(2, 1, 0), lambda x, t, s, labels: torch.ones_like(x))
    bound = flow_bound(steps=CYCLE_STEPS + 1, scale=4.0)  # of the points, of velocity 1 in each coordinate
    assert all(error <= bound for error in cycle_errors(straight, dataset, sampling).values())
    lame = Known(network(2, 1, 0), lambda x, t, s, labels: torch.ones_like(x) * (t == s))
    errors = cycle_errors(lame, dataset, sampling)
    assert errors.keys() == CONTEXT
    for name, t in (("cycle_error_t0.25", 0.25), ("cycle_error_t0.5", 0.5), ("cycle_error_t1", 1.0)):
        assert abs(errors[name] - t) <= bound


class Detector(torch.nn.Module):
    """Sum and largest value of each channel, in place of Inception's features; exact in any batch."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.to(torch.float32).flatten(2)
        features = torch.cat([x.sum(dim=2), x.amax(dim=2)], dim=1)
        return features if return_features else features[:, :1]


def features(images: Tensor) -> Tensor:
    return Detector()(images, True)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The detector, an archive of 20 images with labels, and reference statistics."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
    labels = [[f"{i:02d}.png", i % 3] for i in range(20)]
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    torch.jit.script(Detector()).save(str(tmp_path / "detector.pt"))
    np.savez(tmp_path / "reference.npz", mu=MOMENTS.mean.numpy(), sigma=MOMENTS.covariance.numpy())
    return {"inception": tmp_path / "detector.pt", "images": tmp_path / "images", "npz": tmp_path / "reference.npz"}


def image_network() -> Known:
    return Known(network(3, 4, 3), lambda x, t, s, labels: x * (0.5 + 0.1 * labels[:, None, None, None]))


def samples_of(model: Known, count: int) -> Tensor:
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(0))
    batches = generate(model, labels, w=1.5, steps=1, scaled=False, seed=0, batch=count)
    return torch.cat(list(batches))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_images_are_judged_by_inception_features(files: dict[str, Path]) -> None:
    model = image_network()
    config = training(model.config, DataConfig(name="archive", path=str(files["images"]), num_classes=3))
    generated = features(to_uint8(samples_of(model, 30)))
    pixels = np.stack([np.asarray(Image.open(files["images"] / f"{i:02d}.png")) for i in range(20)])
    real = features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    common = {"nfe": (1,), "samples": 30, "batch": 7, "inception": files["inception"]}

    with_images = evaluate(model, config, settings(**common, reference_images=files["images"])).by_nfe[1]
    quality = precision_recall(generated, real)
    assert with_images == {"fid": frechet_distance(generated, real), **quality._asdict()}
    moments = evaluate(model, config, settings(**common, reference=files["npz"]))
    assert moments.by_nfe[1] == {"fid": frechet_distance(generated, MOMENTS)}
    assert moments.samples == 30 and moments.context.keys() == CONTEXT
    both = evaluate(model, config, settings(**common, reference=files["npz"], reference_images=files["images"]))
    assert both.by_nfe[1] == {**moments.by_nfe[1], **quality._asdict()}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_latents_are_decoded_before_they_are_judged(files: dict[str, Path], tmp_path: Path) -> None:
    from diffusers.models.autoencoders import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "0.npy", np.ones((8, 4, 4), np.float32))
    (tmp_path / "latents" / "dataset.json").write_text('{"labels": [["0.npy", 1]]}')
    model = Known(network(4, 4, 3), lambda x, t, s, labels: x * 0.5)
    data = DataConfig(name="archive", path="moved away", latents="imagenet512", num_classes=3)
    chosen = {"nfe": (1,), "samples": 20, "batch": 20, "inception": files["inception"], "reference": files["npz"]}
    chosen |= {"data": str(tmp_path / "latents")}
    result = evaluate(model, training(model.config, data), settings(**chosen, vae=tmp_path / "vae"))
    images = decoded(samples_of(model, 20), "imagenet512", load_vae(tmp_path / "vae", torch.device("cpu")))
    assert result.by_nfe[1]["fid"] == frechet_distance(features(to_uint8(images)), MOMENTS)
    with pytest.raises(ValueError, match="needs --vae FOLDER to decode"):
        evaluate(model, training(model.config, data), settings(**chosen))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"fetch https://.*inception-2015-12-05\.pt and pass --inception"),
        ({"inception": "inception"}, "FID needs --reference"),
        ({"inception": Path("none.pt"), "reference": "npz"}, r"no Inception weights at none\.pt: fetch https"),
        ({"inception": "inception", "reference": Path("none.npz")}, "no reference statistics at"),
        ({"inception": "inception", "reference_images": Path("none")}, "no dataset at none"),
        ({"inception": "inception", "reference": "npz", "vae": Path("vae")}, "takes no --vae"),
        ({"inception": "inception", "reference": "npz", "data": "none"}, "no dataset at none"),
    ],
)
def test_missing_files_are_asked_for_before_the_first_sample(
    fields: dict, message: str, files: dict[str, Path]
) -> None:
    def never(*_: Tensor) -> Tensor:
        raise AssertionError("a sample was drawn")

    model = Known(network(3, 4, 3), never)
    config = training(model.config, DataConfig(name="archive", path=str(files["images"]), num_classes=3))
    given = {name: files.get(value, value) for name, value in fields.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(model, config, settings(**given))


def test_settings_of_other_data_are_refused() -> None:
    config = network(1, 8, 10)
    model = Known(config, lambda x, t, s, labels: x)
    for fields in ({"vae": Path("vae")}, {"reference": Path("r.npz")}, {"samples": 1}):
        with pytest.raises(ValueError, match=r"only for networks of archives|at least 2"):
            evaluate(model, training(config, DataConfig()), settings(**fields))


def save_run(folder: Path, config: DiTConfig, data: DataConfig) -> Path:
    torch.manual_seed(0)
    tensors = {f"{word}.{n}": v for word in ("ema", "network") for n, v in DiT(config).state_dict().items()}
    return save(folder, 1, tensors, training(config, data), ALONE)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--device", "cpu"])
    command.main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_run(tmp_path / "run", network(2, 1, 0), DataConfig(name="checkerboard"))
    run(monkeypatch, checkpoint, "--nfe", "1,2,4", "--samples", "32", "--out", tmp_path / "quality.json")
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["samples"] == 32 and list(written["nfe"]) == ["1", "2", "4"]
    assert written["context"].keys() == {f"{figure}_fresh" for figure in ("w2", "precision", "recall")} | CONTEXT
    # The output layer of a new network is zero: its samples are the noise, in any number of steps.
    assert len({figures["w2"] for figures in written["nfe"].values()}) == 1
    shown = capsys.readouterr().out
    assert "w2_fresh" in shown and f"{written['nfe']['1']['w2']:.4g}" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"run", "quality.json"}


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="error: no checkpoint in"):
        run(monkeypatch, tmp_path)
    checkpoint = save_run(tmp_path / "run", network(2, 1, 0), DataConfig(name="moons"))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, checkpoint, "--samples", "8", "--vae", tmp_path)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: vae: only for networks of archives")


def test_help_names_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "CHECKPOINT" in shown and "INT,INT,..." in shown and "inception-2015-12-05.pt" in shown
