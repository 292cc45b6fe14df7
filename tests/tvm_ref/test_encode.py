"""`encode`: a folder of images becomes an archive of latents, with a small VAE created by the test."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tvm_ref import encode
from tvm_ref.data.archive import DatasetError, LatentArchive
from tvm_ref.data.latents import denormalise
from tvm_ref.data.vae import decode, load_vae
from tvm_ref.data.vae import encode as encode_images
from tvm_ref.encode import EncodeConfig, encode_folder, list_images, read_square

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers.models.autoencoders import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    small_vae(AutoencoderKL, latent_channels=4).save_pretrained(folder)
    return folder


def small_vae(kind: type, latent_channels: int) -> torch.nn.Module:
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 4,  # eight times smaller, like the published one
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=latent_channels,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, three files of different formats, shapes and modes."""
    random = np.random.default_rng(0)
    for name, shape in (("b/two.png", (20, 30, 3)), ("a/deep/one.jpg", (40, 24, 3)), ("b/grey.png", (16, 16))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def settings(images: Path, vae: Path, out: Path, **others: int) -> EncodeConfig:
    return EncodeConfig(images=images, vae=vae, out=out, device="cpu", **{"size": 16, "batch": 2} | others)


def test_the_archive_holds_the_posterior_and_the_label_of_every_image(
    images: Path, vae_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents.zip"
    assert encode_folder(settings(images, vae_folder, out)) == (3, 0)
    vae, dataset = load_vae(vae_folder, CPU), LatentArchive(out, 2, "imagenet256")
    names = ["a/deep/one.jpg", "b/grey.png", "b/two.png"]
    expected = encode_images(vae, torch.stack([read_square(images / name, 16) for name in names[:2]]))
    assert dataset.shape == (4, 2, 2) and len(dataset) == 3
    assert np.array_equal(dataset.item(0), expected[0].numpy()) and np.array_equal(dataset.item(1), expected[1].numpy())
    assert np.array_equal(dataset.item(2), encode_images(vae, read_square(images / names[2], 16)[None])[0].numpy())
    assert dataset.get(np.arange(3), torch.Generator())[1].tolist() == [0, 1, 1]
    with zipfile.ZipFile(out) as archive:
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert archive.namelist()[0] == "00000/img-mean-std-00000000.npy"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "latents.zip"}


def test_mean_and_deviation_are_those_of_the_posterior(vae_folder: Path) -> None:
    vae = load_vae(vae_folder, CPU)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    latents = encode_images(vae, images)
    assert torch.equal(latents[:, :4], posterior.mean) and torch.equal(latents[:, 4:], posterior.std)
    assert not latents.requires_grad and not vae.training
    with pytest.raises(ValueError, match="uint8"):
        encode_images(vae, images.float())


def test_the_decoder_gets_latents_on_their_own_scale(vae_folder: Path) -> None:
    vae, z = load_vae(vae_folder, CPU), torch.randn(2, 4, 3, 3)
    images = decode(vae, z, "imagenet512")
    assert images.shape == (2, 3, 24, 24) and not images.requires_grad
    assert torch.equal(images, vae.decode(denormalise(z, "imagenet512")).sample)


def test_images_are_cut_to_their_central_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = [10, 20, 30]
    for name, pixels in (("wide.png", wide), ("tall.png", wide.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name)
        square = read_square(tmp_path / name, 16)
        assert square.dtype == torch.uint8 and square.shape == (3, 16, 16)
        assert (square == torch.tensor([10, 20, 30])[:, None, None]).all()


def test_labels_of_dataset_json_come_first(images: Path) -> None:
    entries = [["b/two.png", 7], ["a/deep/one.jpg", 5], ["b/grey.png", 0]]
    (images / "dataset.json").write_text(json.dumps({"labels": entries}))
    assert list_images(images) == (["a/deep/one.jpg", "b/grey.png", "b/two.png"], [5, 0, 7])
    for broken in (entries[:2], [*entries, ["c.png", 1]], [["b/two.png", "7"], *entries[1:]]):
        (images / "dataset.json").write_text(json.dumps({"labels": broken}))
        with pytest.raises(DatasetError, match=r"dataset\.json"):
            list_images(images)
    for content in ("[", '{"labels": 3}', "{}", "3"):
        (images / "dataset.json").write_text(content)
        with pytest.raises(DatasetError, match=r"dataset\.json: expected"):
            list_images(images)


def test_images_without_folders_have_no_labels(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "x.webp")
    encode_folder(settings(tmp_path / "flat", vae_folder, tmp_path / "out.zip", size=8))
    assert len(LatentArchive(tmp_path / "out.zip", 0, "imagenet256")) == 1
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        LatentArchive(tmp_path / "out.zip", 1, "imagenet256")


def test_folders_that_mix_or_lack_images_are_refused(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(images / "x.png")
    with pytest.raises(DatasetError, match=r"x\.png lies in no class folder"):
        list_images(images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no image"):
        list_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        list_images(tmp_path / "none")


def test_nothing_is_overwritten(images: Path, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.zip").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.zip exists"):
        encode_folder(settings(images, vae_folder, tmp_path / "out.zip"))
    assert (tmp_path / "out.zip").read_text() == "precious"


@pytest.mark.parametrize("others", [{"size": 12}, {"size": 0}, {"batch": 0}])
def test_impossible_sizes_are_refused(others: dict, images: Path, vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size: expected a multiple of 8|batch: expected at least 1"):
        encode_folder(settings(images, vae_folder, tmp_path / "out.zip", **others))


def test_an_autoencoder_that_does_not_fit_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    from diffusers.models.autoencoders import AutoencoderKL

    with pytest.raises(FileNotFoundError, match="stabilityai/sd-vae-ft-ema"):
        load_vae(tmp_path, CPU)
    small_vae(AutoencoderKL, latent_channels=16).save_pretrained(tmp_path / "sixteen")
    with pytest.raises(ValueError, match=r"got \(3, 3, 16\)"):
        load_vae(tmp_path / "sixteen", CPU)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    torch.save({}, tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_vae(tmp_path / "pickled", CPU)


def test_an_autoencoder_whose_weights_do_not_fit_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    config.write_bytes((vae_folder / "config.json").read_bytes())
    weights = load_file(vae_folder / file.name)
    first = min(weights)
    without = {name: value for name, value in weights.items() if name != first}
    for content, message in (
        (without, f"missing weights, first {first}"),
        ({**weights, "other": weights[first].clone()}, "unexpected weights, first other"),
        ({**weights, first: torch.zeros(99)}, "size mismatch"),
    ):
        save_file(content, file)
        with pytest.raises(ValueError, match=message):
            load_vae(tmp_path, CPU)
    file.write_bytes((vae_folder / file.name).read_bytes()[:2000])
    with pytest.raises(ValueError, match="do not make an AutoencoderKL"):
        load_vae(tmp_path, CPU)


def test_the_command(
    images: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents.zip"
    command = ["encode", str(images), "--vae", str(vae_folder), "--out", str(out), "--size", "16", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    encode.main()
    assert f"3 images encoded into {out}" in capsys.readouterr().out and out.exists()
    with pytest.raises(SystemExit, match=r"^2$"):
        encode.main()
    assert "latents.zip exists" in capsys.readouterr().err
