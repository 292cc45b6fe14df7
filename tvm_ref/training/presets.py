"""Complete training configurations by name, for `python -m tvm_ref.train PRESET`. Each is a function."""

from collections.abc import Callable

from ..data.dataset import DataConfig
from ..data.latents import LatentStatisticsName
from ..model.config import SIZES, DiTConfig
from ..objective.loss import LossConfig
from ..objective.time_sampling import TimeConfig
from .config import OptimConfig, RunConfig, TrainConfig


def toy2d() -> TrainConfig:
    """Eight Gaussians in the plane, without classes: a minute or two on a laptop."""
    return TrainConfig(
        model=DiTConfig(
            image_size=1,
            channels=2,
            patch=1,
            width=64,
            depth=3,
            heads=1,
            guidance=False,
            attention_backend="reference",  # the fastest one for a single token
        ),
        data=DataConfig(name="eight_gaussians"),
        loss=LossConfig(w=1.0),
        times=TimeConfig(s_mu=-1.2),  # more times close to the data, where Gaussians this narrow separate
        optim=OptimConfig(lr=2e-3, ema=0.985),
        run=RunConfig(steps=1050, batch=256, out="runs/toy2d", save_every=350, sample_every=350, threads=1),
    )


def squares() -> TrainConfig:
    """Sets of four points, the corners of a square, which attention must relate: some minutes on a laptop."""
    return TrainConfig(
        model=DiTConfig(
            image_size=2,
            channels=2,
            patch=1,
            width=64,
            depth=3,
            heads=4,
            guidance=False,
            attention_backend="reference",  # the fastest one for a few tokens
        ),
        data=DataConfig(name="squares"),
        loss=LossConfig(w=1.0),
        optim=OptimConfig(lr=2e-3, ema=0.985),
        run=RunConfig(steps=1050, batch=256, out="runs/squares", save_every=350, sample_every=350, threads=1),
    )


def digits() -> TrainConfig:
    """The handwritten digits of scikit-learn, 8 x 8 pixels in ten classes: some minutes on a laptop."""
    return TrainConfig(
        model=DiTConfig(
            image_size=8,
            channels=1,
            patch=4,
            width=128,
            depth=4,
            heads=4,
            num_classes=10,
            attention_backend="reference",  # the fastest one for a few tokens
        ),
        data=DataConfig(name="digits"),
        loss=LossConfig(w=1.5),
        optim=OptimConfig(lr=1e-3, ema=0.985),
        run=RunConfig(steps=576, batch=128, out="runs/digits", save_every=144, sample_every=144, threads=1),
    )


def fashion() -> TrainConfig:
    """Fashion-MNIST, 28 x 28 pixels in ten classes: a DiT of 9 million weights, 18 minutes on one H200.

    That is 20 000 times the 52 ms that a step takes there with --run.cuda-graph (74 ms without, on a host that other
    programs used); nobody has made the whole run. Give --data.path, the folder with its four .gz files.
    """
    return TrainConfig(
        model=DiTConfig(image_size=28, channels=1, patch=2, width=256, depth=8, heads=4, num_classes=10),
        data=DataConfig(name="fashion", path="data/fashion-mnist"),
        loss=LossConfig(w=1.5),
        optim=OptimConfig(lr=5e-4, warmup_steps=500, ema=0.999),
        run=RunConfig(
            steps=20_000,
            batch=256,
            precision="bfloat16",
            compile=True,
            out="runs/fashion",
            save_every=5000,
            sample_every=5000,
            log_every=10,
        ),
    )


def imagenet256_w2() -> TrainConfig:
    """ImageNet at 256 pixels, DiT-XL/2, w = 2: published 1-NFE FID 3.29, 2-NFE 2.80."""
    return _imagenet(256, w=2.0, spectral_time_mlp=True)


def imagenet256_w175() -> TrainConfig:
    """ImageNet at 256 pixels, DiT-XL/2, w = 1.75: published 1-, 2-, 4-NFE FID 4.58, 2.61, 1.99."""
    return _imagenet(256, w=1.75)


def imagenet512_w25() -> TrainConfig:
    """ImageNet at 512 pixels, DiT-XL/2, w = 2.5, not scaled: published 1-NFE FID 4.32, 2-NFE 3.50."""
    return _imagenet(512, w=2.5, scaled=False)


def imagenet512_w225() -> TrainConfig:
    """ImageNet at 512 pixels, DiT-XL/2, w = 2.25: published 1-, 2-, 4-NFE FID 5.37, 3.89, 2.94."""
    return _imagenet(512, w=2.25, spectral_time_mlp=True)


def _imagenet(pixels: int, *, w: float, scaled: bool = True, spectral_time_mlp: bool = False) -> TrainConfig:
    """The published settings (Zhou et al., arXiv 2511.19797), with micro-batches for 8 GPUs of 80 GiB or more."""
    size = SIZES["XL/2-18h"]
    statistics: LatentStatisticsName = "imagenet256" if pixels == 256 else "imagenet512"
    return TrainConfig(
        model=DiTConfig(
            image_size=pixels // 8,
            channels=4,
            patch=size["patch"],
            width=size["width"],
            depth=size["depth"],
            heads=size["heads"],
            num_classes=1000,
            spectral_time_mlp=spectral_time_mlp,
        ),
        data=DataConfig(name="archive", path=f"data/{statistics}.zip", latents=statistics, num_classes=1000),
        loss=LossConfig(w=w, scaled=scaled, label_dropout=0.1),
        times=TimeConfig(kind="gap*", gap_mu=-0.8, gap_sigma=1.0, s_mu=-0.4, s_sigma=1.0),
        optim=OptimConfig(
            lr=1e-4,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            clip=None if pixels == 256 else 1.0,
            target_ema=0.99,
            ema=0.9999,
        ),
        run=RunConfig(
            steps=300_000,
            batch=2048,
            accumulate=4 if pixels == 256 else 16,
            precision="bfloat16",
            compile=True,
            out=f"runs/{statistics}-w{w:g}",
            save_every=5000,
            sample_every=5000,
            log_every=10,
            evaluate=False,  # FID needs 50000 samples and the Inception weights: python -m tvm_ref.evaluate
        ),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "toy2d": toy2d,
    "squares": squares,
    "fashion": fashion,
    "imagenet256-w2": imagenet256_w2,
    "imagenet256-w1.75": imagenet256_w175,
    "imagenet512-w2.5": imagenet512_w25,
    "imagenet512-w2.25": imagenet512_w225,
}
