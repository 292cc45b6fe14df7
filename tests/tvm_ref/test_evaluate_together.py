"""`evaluate` by several processes, killed or stopped at any point: the same figures and images as in one go."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flashjvp_commands.ending import status_of
from tests.tvm_ref import kills
from tests.tvm_ref.quality.test_vit import weights
from tests.tvm_ref.runs import CHILDREN, finish, launch, start, together
from tvm_ref import evaluate as command
from tvm_ref.convert import convert
from tvm_ref.data.archive import ImageArchive
from tvm_ref.data.dataset import DataConfig
from tvm_ref.model.dit import DiTConfig
from tvm_ref.objective.loss import LossConfig
from tvm_ref.quality.inception import InceptionDetector
from tvm_ref.quality.metrics import frechet_distance, precision_recall
from tvm_ref.quality.vit import VitFeatures
from tvm_ref.sampling.generate import generate
from tvm_ref.sampling.grids import to_uint8
from tvm_ref.training.checkpoint import ALONE, save
from tvm_ref.training.config import RunConfig, TrainConfig, save_config
from tvm_ref.unfinished import beside
from verify.oracles.network import trained

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
SAMPLES, BATCH, REAL = 23, 4, 9
CPU = torch.device("cpu")


class Detector(torch.nn.Module):
    """Sum and largest value of each channel, in place of Inception's features; exact in any batch."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.to(torch.float32).flatten(2)
        features = torch.cat([x.sum(dim=2), x.amax(dim=2)], dim=1)
        return features if return_features else features[:, :1]


def pictures(folder: Path, count: int) -> Path:
    draw = np.random.default_rng(1)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    labels = [[f"{i:02d}.png", i % 3] for i in range(count)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def configuration(data: Path) -> TrainConfig:
    model = DiTConfig(
        image_size=4, channels=3, patch=2, width=8, depth=1, heads=1, num_classes=3, attention_backend="reference"
    )
    archive = DataConfig(name="archive", path=str(data), num_classes=3)
    return TrainConfig(model=model, data=archive, loss=LossConfig(w=1.5), run=RunConfig(steps=1, batch=1, out="run"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run on images, their archive, a detector and a vision transformer."""
    config = configuration(pictures(tmp_path / "images", REAL))
    network = trained(config.model, seed=3, dtype=torch.float32)
    save(tmp_path / "run", 1, {f"ema.{name}": value for name, value in network.state_dict().items()}, config, ALONE)
    torch.jit.script(Detector()).save(str(tmp_path / "detector.pt"))
    save_file(weights(), tmp_path / "vit.safetensors")
    return tmp_path


def arguments(folder: Path, name: str, *others: str, checkpoint: str = "run") -> list[str]:
    """A command that writes NAME.json, and its samples into NAME-nfe-1.zip and NAME-nfe-2.zip."""
    given = {
        "--nfe": "1,2", "--samples": str(SAMPLES), "--batch": str(BATCH), "--inception": str(folder / "detector.pt"),
        "--features": str(folder / "vit.safetensors"), "--reference-images": str(folder / "images"), "--device": "cpu",
        "--out": str(folder / f"{name}.json"), "--save-images": str(folder / f"{name}.zip"),
    } | dict(zip(others[::2], others[1::2], strict=True))  # fmt: skip
    return [str(folder / checkpoint), *(word for option in given.items() for word in option)]


def evaluated(words: list[str], counter: Any = None, last: int = -1) -> None:
    """The command, in a child."""
    if counter is not None:
        kills.at_a_file_call(counter, last)
    command.main(words)


def results(folder: Path, name: str) -> list[bytes]:
    return [(folder / f"{name}{part}").read_bytes() for part in (".json", "-nfe-1.zip", "-nfe-2.zip")]


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "unfinished" in path.name or path.name.startswith(".")]


def test_figures_are_those_of_the_features_of_images_drawn_in_one_go(folder: Path) -> None:
    command.main(arguments(folder, "one"))
    written = json.loads((folder / "one.json").read_text())
    assert written["samples"] == SAMPLES and list(written["nfe"]) == ["1", "2"] and left(folder) == []
    loaded = command.load_model(folder / "run", device=CPU)
    labels = torch.randint(3, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    real = ImageArchive(folder / "images", 0).pixels(np.arange(REAL))
    inception, vit = InceptionDetector(folder / "detector.pt", CPU), VitFeatures(folder / "vit.safetensors", CPU)
    for nfe in (1, 2):
        drawn = list(generate(loaded.model, labels, w=1.5, steps=nfe, scaled=True, seed=0, batch=BATCH))
        images = to_uint8(torch.cat(drawn))
        saved = ImageArchive(folder / f"one-nfe-{nfe}.zip", 3)
        assert torch.equal(saved.pixels(np.arange(SAMPLES)), images)
        assert torch.equal(saved.get(np.arange(SAMPLES), torch.Generator())[1], labels)
        figures = written["nfe"][str(nfe)]
        assert figures.keys() == {"fid", "precision", "recall", "fd_vit", "precision_vit", "recall_vit"}
        features = inception.features(images)
        order = inception.features(real)
        covered = precision_recall(features.double(), order.double())
        assert (figures["precision"], figures["recall"]) == covered
        close = frechet_distance(features, order)
        assert abs(figures["fid"] - close) <= close * 2**-30  # the real images come in another order
        assert figures["fd_vit"] > 0 and vit.features(images).shape == (SAMPLES, 64)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_share_the_work_and_give_the_results_of_one(size: int, folder: Path) -> None:
    """23 samples in parts of 4, and 9 real images: no size divides them, and 8 have more processes than parts."""
    finish(start(evaluated, arguments(folder, "one")))
    together(size, evaluated, arguments(folder, "many"))
    assert results(folder, "many") == results(folder, "one") and left(folder) == []


@pytest.mark.parametrize("attempts", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_killed_at_any_point_the_results_are_the_same(attempts: int, folder: Path) -> None:
    calls, choice = CHILDREN.Value("i", 0), random.Random()
    began = time.monotonic()
    finish(start(evaluated, arguments(folder, "whole"), calls, -1))
    seconds, total = time.monotonic() - began, calls.value
    words = arguments(folder, "broken")
    for attempt in range(attempts):
        if attempt % 2:  # one process, between two changes of files
            calls.value = 0
            children = [start(evaluated, words, calls, choice.randrange(total))]
        else:
            children = launch(choice.randint(1, 3), evaluated, words)
            time.sleep(choice.uniform(0, 1.5 * seconds))
            for child in children:
                child.kill()
        for child in children:
            child.join()
        if (folder / "broken.json").exists() and not (beside(folder / "broken.json")).exists():
            break  # the command came to its end
    else:
        finish(start(evaluated, words))
    assert results(folder, "broken") == results(folder, "whole") and left(folder) == []


def test_other_settings_and_files_are_refused_and_a_second_command_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(folder, "a")
    original, refused = command.evaluate_images, []

    def stops(*given: Any, **options: Any) -> Any:
        with pytest.raises(SystemExit, match=r"error: out: expected a folder that no other run is using"):
            command.main(words)
        refused.append(True)
        drawn = []
        options["stop"] = lambda: drawn.append(0) or len(drawn) > 4
        assert original(*given, **options) is None
        raise ValueError("stopped")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: stopped"):
        patch.setattr(command, "evaluate_images", lambda *a, **b: (patch.undo(), stops(*a, **b))[1])
        command.main(words)
    assert refused and left(folder) == ["a.json.unfinished"]
    for others, message in ((["--seed", "1"], "seed: 0 before, 1 now"), (["--w", "2"], "w: 1.5 before, 2.0 now")):
        with pytest.raises(SystemExit, match=f"error: .* is unfinished work with other settings .*{message}"):
            command.main([*words, *others])
    command.main(words)
    command.main(arguments(folder, "b"))
    assert results(folder, "a") == results(folder, "b") and left(folder) == []


def test_images_are_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a-nfe-2.zip").write_text("precious")
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main(arguments(folder, "a"))
    assert "a-nfe-2.zip exists already" in capsys.readouterr().err
    assert (folder / "a-nfe-2.zip").read_text() == "precious" and left(folder) == []
    words = arguments(folder, "b")
    words[words.index("1,2")] = "1"
    words[words.index(str(folder / "b.zip"))] = str(folder / "samples")
    command.main(words)  # one NFE: the path as it is, and a folder
    assert len(ImageArchive(folder / "samples", 3)) == SAMPLES


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_tiny_sets(count: int, folder: Path) -> None:
    words = arguments(folder, "a", "--samples", str(count))
    if count < 4:
        with pytest.raises(SystemExit, match=f"precision and recall need 4 images, got {count} samples and 9 real"):
            command.main(words)
        reference = folder / "reference.npz"
        np.savez(reference, mu=np.zeros(6), sigma=np.eye(6))
        start_of = [str(folder / "run"), "--nfe", "1", "--samples", str(count), "--device", "cpu"]
        words = [*start_of, "--inception", str(folder / "detector.pt"), "--reference", str(reference)]
        words += ["--out", str(folder / "a.json")]
    command.main(words)
    figures = json.loads((folder / "a.json").read_text())["nfe"]["1"]
    assert all(np.isfinite(value) for value in figures.values())


def test_statistics_of_another_network_are_found_before_the_first_sample(folder: Path) -> None:
    np.savez(folder / "reference.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(SystemExit, match="inception: expected statistics of 6 features, got 7"):
        command.main(arguments(folder, "a", "--reference", str(folder / "reference.npz")))
    with pytest.raises(SystemExit, match="vit: expected statistics of 64 features, got 7"):
        command.main(arguments(folder, "a", "--features-reference", str(folder / "reference.npz")))
    np.savez(folder / "vit.npz", mu=np.zeros(64), sigma=np.eye(64))
    command.main(arguments(folder, "a", "--features-reference", str(folder / "vit.npz")))
    assert left(folder) == []


def test_converted_weights_are_evaluated(folder: Path) -> None:
    config = configuration(folder / "images")
    network = trained(config.model, seed=3, dtype=torch.float32)
    (folder / "network.pkl").write_bytes(pickle.dumps({f"model.{n}": x for n, x in network.state_dict().items()}))
    save_config(config, folder / "config.json")
    convert(folder / "network.pkl", folder / "weights.safetensors", str(folder / "config.json"))
    command.main(arguments(folder, "converted", checkpoint="weights.safetensors"))
    command.main(arguments(folder, "run"))
    assert results(folder, "converted") == results(folder, "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_finished_and_names_it(folder: Path, number: signal.Signals) -> None:
    words = arguments(folder, "a")
    words[words.index(str(SAMPLES))] = "100000"
    with subprocess.Popen(
        [sys.executable, "-m", "tvm_ref.evaluate", *words], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as child:
        deadline = time.monotonic() + 120
        while len(list(beside(folder / "a.json").glob("nfe-*.part"))) < 2:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "Traceback" not in said
    assert "finished parts are kept in" in said and not (folder / "a.json").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--save-images {here}/a.jpg", 2, "ends with"),
        ("--nfe 1,0", 2, "nfe: expected at least 1"),
        ("--samples 1", 2, "samples: expected at least 2"),
        ("--features {here}/none.safetensors", 1, "no feature network at"),
        ("--features {here}/detector.pt", 1, "expected safetensors"),
        ("--features-reference {here}/none.npz", 1, "no reference statistics at"),
        ("--reference-images {here}/run", 1, "holds no .png file"),
        ("--data {here}/none", 1, "no dataset at"),
        ("--device cuda:77", 2, "device: cuda:77 is not there"),
    ],
)
def test_a_bad_input_is_said_in_one_line(
    words: str, status: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    given = arguments(folder, "a", *words.format(here=folder).split())
    assert status_of(lambda: command.main(given)) == status
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and sorted(folder.rglob("*")) == before
