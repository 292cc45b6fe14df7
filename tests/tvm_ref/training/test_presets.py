"""The presets have the published settings, and every setting can be changed on the command line."""

from pathlib import Path

import pytest

from tvm_ref import train
from tvm_ref.model.dit import DiTConfig
from tvm_ref.training import presets
from tvm_ref.training.config import TrainConfig

PUBLISHED = ["imagenet256-w2", "imagenet256-w1.75", "imagenet512-w2.5", "imagenet512-w2.25"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    """Zhou et al., arXiv 2511.19797, and its published configuration files."""
    config = presets.PRESETS[name]()
    pixels = int(name[8:11])
    assert config.model == DiTConfig(
        image_size=pixels // 8,
        channels=4,
        patch=2,
        width=1152,
        depth=28,
        heads=18,
        num_classes=1000,
        spectral_time_mlp=name in ("imagenet256-w2", "imagenet512-w2.25"),
    )
    assert config.loss.w == float(name.split("-w")[1])
    assert config.loss.scaled == (name != "imagenet512-w2.5")
    assert (config.loss.objective, config.loss.label_dropout, config.loss.w_random) == ("tvm", 0.1, None)
    optim = config.optim
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.warmup_steps) == (1e-4, (0.9, 0.95), 1e-8, 0, 0)
    assert (optim.target_ema, optim.ema, optim.clip) == (0.99, 0.9999, 1.0 if pixels == 512 else None)
    times = config.times
    assert (times.kind, times.gap_mu, times.gap_sigma, times.s_mu, times.s_sigma) == ("gap*", -0.8, 1.0, -0.4, 1.0)
    assert times.equal_share == 0
    assert (config.run.batch, config.run.steps, config.run.precision) == (2048, 300_000, "bfloat16")
    assert config.run.batch % (8 * config.run.accumulate) == 0


def test_no_argument_is_digits() -> None:
    assert train.parse([]) == presets.digits()
    assert train.parse(["--run.steps", "7"]).run.steps == 7
    assert train.parse(["toy2d"]) == presets.toy2d()


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--model.width", "64"], "model.width", 64),
        (["--loss.objective", "flow"], "loss.objective", "flow"),
        (["--loss.w-random", "1,2"], "loss.w_random", (1.0, 2.0)),
        (["--times.kind", "clamp"], "times.kind", "clamp"),
        (["--optim.betas", "0.8,0.9"], "optim.betas", (0.8, 0.9)),
        (["--optim.clip", "2"], "optim.clip", 2.0),
        (["--run.checkpointing", "selective"], "run.checkpointing", "selective"),
        (["--run.compile"], "run.compile", True),
    ],
)
def test_fields_can_be_changed(arguments: list[str], field: str, value: object) -> None:
    config: TrainConfig = train.parse(["digits", *arguments])
    part, name = field.split(".")
    assert getattr(getattr(config, part), name) == value


@pytest.mark.parametrize("arguments", [["--help"], ["digits", "--help"]])
def test_help_names_presets_and_fields(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train.parse(arguments)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    wanted = list(presets.PRESETS) if len(arguments) == 1 else ["--run.batch", "images of one step", "--optim.lr"]
    assert all(name in shown for name in wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--run.steps", "0"], "run.steps: expected at least 1, got 0"),
        (["digits", "--model.heads", "5"], "width: expected a multiple of heads = 5, got 128"),
        (["imagenet256-w2", "--run.out", "{out}"], "imagenet256.zip"),
        (["imagenet256-w2", "--run.evaluate", "--run.out", "{out}"], "expected no (--run.no-evaluate) for an archive"),
        (
            ["digits", "--model.num-classes", "9", "--run.out", "{out}"],
            "the data have 10 classes, but the network has 9",
        ),
        (["digits", "--model.image-size", "16", "--run.out", "{out}"], r"the network takes (1, 16, 16)"),
        (["digits", "--run.batch", "100", "--run.accumulate", "3", "--run.out", "{out}"], "a multiple of 3"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["train", *(argument.format(out=out) for argument in arguments)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main()
    captured = capsys.readouterr()
    text = str(end.value) + captured.out + captured.err
    assert message in " ".join(text.replace("│", " ").split())
    assert end.value.code not in (0, None)
    assert list(tmp_path.iterdir()) == []
