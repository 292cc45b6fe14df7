"""`encode` by several processes, killed or stopped at any point, and past bad files: the archive is always the same."""

import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tvm_ref import kills
from tests.tvm_ref.runs import CHILDREN, finish, launch, start, together
from tvm_ref import encode as command
from tvm_ref.data.archive import DatasetError, LatentArchive
from tvm_ref.encode import EncodeConfig, encode_folder
from tvm_ref.training.parallel import world_on
from tvm_ref.training.run_lock import RunLockedError
from tvm_ref.unfinished import UnfinishedError, beside

COUNT, BATCH = 11, 2


def fake_vae(_: Any, images: Tensor) -> Tensor:
    """Latents that tell images apart, in place of a posterior."""
    means = images.double().flatten(1).mean(1).float()[:, None, None, None]
    return means.expand(-1, 8, images.shape[2] // 8, images.shape[3] // 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_vae", lambda *_: None)
    monkeypatch.setattr(command, "encode", fake_vae)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three classes, and files in place of a VAE."""
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / f"images/{'abc'[i % 3]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    (tmp_path / "vae").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "vae" / name).write_text(name)
    return tmp_path


def settings(folder: Path, out: Path, **others: int) -> EncodeConfig:
    fields = {"size": 8, "batch": BATCH} | others
    return EncodeConfig(images=folder / "images", vae=folder / "vae", out=out, device="cpu", **fields)


def encoded(config: EncodeConfig, counter: Any = None, last: int = -1) -> None:
    """`encode_folder` with the fake VAE, in a child."""
    command.load_vae, command.encode = lambda *_: None, fake_vae
    if counter is not None:
        kills.at_a_file_call(counter, last)
    with world_on(config.device) as this:
        encode_folder(config, this)


def pixels_of_labels(archive: Path) -> dict[float, int]:
    """The label of each image, which its latent tells."""
    data = LatentArchive(archive, 3, "imagenet256")
    _, labels = data.get(np.arange(len(data)), torch.Generator())
    return {float(data.item(i)[0, 0, 0]): int(label) for i, label in enumerate(labels)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_share_the_work_and_make_the_archive_of_one(size: int, folder: Path) -> None:
    """Seven have more processes than parts."""
    encode_folder(settings(folder, folder / "one.zip"))
    together(size, encoded, settings(folder, folder / "many.zip"))
    assert (folder / "many.zip").read_bytes() == (folder / "one.zip").read_bytes()
    assert not list(folder.glob("*unfinished*")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("attempts", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_killed_at_any_point_the_archive_is_the_same(attempts: int, folder: Path) -> None:
    whole, broken = folder / "whole.zip", folder / "broken.zip"
    calls, choice = CHILDREN.Value("i", 0), random.Random()
    began = time.monotonic()
    finish(start(encoded, settings(folder, whole), calls, -1))
    seconds, total = time.monotonic() - began, calls.value
    for attempt in range(attempts):
        if attempt % 2:  # one process, between two changes of files
            calls.value = 0
            children = [start(encoded, settings(folder, broken), calls, choice.randrange(total))]
        else:
            children = launch(choice.randint(1, 3), encoded, settings(folder, broken))
            time.sleep(choice.uniform(0, 1.5 * seconds))
            for child in children:
                child.kill()
        for child in children:
            child.join()
        if broken.exists() and not beside(broken).exists():
            assert broken.read_bytes() == whole.read_bytes()
            broken.unlink()
    finish(start(encoded, settings(folder, broken)))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*unfinished*")) and not list(folder.glob(".*"))


def test_killed_after_the_archive_was_written_the_command_ends_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: object) -> None:
        raise KeyboardInterrupt

    config = settings(folder, folder / "out.zip")
    with monkeypatch.context() as patch:
        patch.setattr("tvm_ref.unfinished.Unfinished.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_folder(config)
    content = (folder / "out.zip").read_bytes()
    assert beside(config.out).exists() and encode_folder(config) == (COUNT, 0)
    assert not beside(config.out).exists() and config.out.read_bytes() == content
    with pytest.raises(FileExistsError):
        encode_folder(config)


def damage(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


def test_bad_images_are_named_and_skipped_up_to_the_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_folder(settings(folder, folder / "all.zip"))
    before = pixels_of_labels(folder / "all.zip")
    damage(folder / "images/b/01.png")
    (folder / "images/c/05.png").unlink()
    (folder / "images/c/05.png").symlink_to("nowhere")
    config = settings(folder, folder / "out.zip", max_bad=1)
    with pytest.raises(DatasetError, match=r"05\.png: .*\(2 bad images, and max_bad = 1\); --max-bad allows"):
        encode_folder(config)
    said = capsys.readouterr().err
    assert "skipped bad image 1 of at most 1:" in said and "01.png" in said
    assert "finished parts are kept in" in said
    assert encode_folder(settings(folder, folder / "out.zip", max_bad=2)) == (COUNT - 2, 2)
    after = pixels_of_labels(folder / "out.zip")
    assert len(after) == COUNT - 2 and after.items() < before.items()
    with zipfile.ZipFile(folder / "out.zip") as archive:  # the others keep their numbers
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert [name for name, _ in labels] == archive.namelist()[:-1] and len(labels) == COUNT - 2


def test_bad_images_count_over_all_processes_and_over_resumed_runs(folder: Path) -> None:
    for name in ("a/00", "b/04", "c/08"):
        damage(folder / f"images/{name}.png")
    together(3, encoded, settings(folder, folder / "out.zip", max_bad=3))
    assert len(pixels_of_labels(folder / "out.zip")) == COUNT - 3
    children = launch(3, encoded, settings(folder, folder / "few.zip", max_bad=2))
    for child in children:
        child.join()
    assert {child.exitcode for child in children} == {1} and not (folder / "few.zip").exists()
    with pytest.raises(DatasetError, match="3 bad images, and max_bad = 2"):
        encode_folder(settings(folder, folder / "few.zip", max_bad=2))
    encode_folder(settings(folder, folder / "few.zip", max_bad=3))
    assert (folder / "few.zip").read_bytes() == (folder / "out.zip").read_bytes()


def test_a_repaired_image_is_read_again_and_the_other_parts_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_folder(settings(folder, folder / "whole.zip"))
    content = damage(folder / "images/c/08.png")
    with pytest.raises(DatasetError, match=r"08\.png"):
        encode_folder(settings(folder, folder / "out.zip"))
    (folder / "images/c/08.png").write_bytes(content)
    kept = len(list(beside(folder / "out.zip").glob("*.part")))
    read = []
    original = command.read_square
    monkeypatch.setattr(command, "read_square", lambda path, size: read.append(path) or original(path, size))
    assert kept >= 4 and encode_folder(settings(folder, folder / "out.zip")) == (COUNT, 0)
    assert len(read) == COUNT - BATCH * kept
    assert (folder / "out.zip").read_bytes() == (folder / "whole.zip").read_bytes()


def test_only_bad_images_make_no_archive(folder: Path) -> None:
    for path in (folder / "images").rglob("*.png"):
        damage(path)
    with pytest.raises(DatasetError, match="none of its 11 images can be read"):
        encode_folder(settings(folder, folder / "out.zip", max_bad=COUNT))
    assert not (folder / "out.zip").exists()


def test_a_second_command_and_other_settings_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, refused = settings(folder, folder / "out.zip"), []

    calls = []

    def stops(vae: Any, images: Tensor) -> Tensor:
        calls.append(images)
        if len(calls) < 3:
            return fake_vae(vae, images)
        with pytest.raises(RunLockedError, match="out: expected a folder that no other run is using"):
            encode_folder(config)
        refused.append(True)
        raise ValueError("stopped")

    monkeypatch.setattr(command, "encode", stops)
    with pytest.raises(ValueError, match="stopped"):
        encode_folder(config)
    assert refused
    monkeypatch.setattr(command, "encode", fake_vae)
    with pytest.raises(UnfinishedError, match=r"batch: 2 before, 3 now"):
        encode_folder(settings(folder, folder / "out.zip", batch=3))
    assert encode_folder(config) == (COUNT, 0)


def test_too_little_room_is_found_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"out: expected .* GiB of free disk space"):
        encode_folder(settings(folder, folder / "out.zip"))
    assert not beside(folder / "out.zip").exists()


SLOW = """
import sys, time
from tests.tvm_ref import test_encode_resumed as test
from flashjvp_commands import ending
def slow(vae, images):
    print("encoding", flush=True)
    time.sleep(0.2)
    return test.fake_vae(vae, images)
test.command.load_vae, test.command.encode = lambda *_: None, slow
sys.exit(ending.run(test.command.main))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_finished_and_names_it(folder: Path, number: signal.Signals) -> None:
    arguments = [str(folder / "images"), "--vae", str(folder / "vae"), "--out", str(folder / "out.zip")]
    arguments += ["--size", "8", "--batch", "1", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for _ in range(3):
            child.stdout.readline()
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "Traceback" not in said
    assert "finished parts are kept in" in said and not (folder / "out.zip").exists()
    assert len(list(beside(folder / "out.zip").glob("*.part"))) >= 2
    assert encode_folder(settings(folder, folder / "out.zip", batch=1)) == (COUNT, 0)


def test_a_limit_below_zero_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_bad: expected at least 0, got -1"):
        settings(folder, folder / "out.zip", max_bad=-1)
