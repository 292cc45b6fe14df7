"""`python -m verify published`: a peer that gives the same numbers agrees, one that does not is caught.

Continuous integration has no checkout of the published code. In its place: the same classes by name, around tvm_ref's.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from reports.environment import DATA
from tests.verify.model.stand_in import WRAPPER
from tvm_ref.data.latents import LATENT_STATISTICS
from tvm_ref.training.presets import PRESETS
from verify import __main__ as command_line
from verify.model import published


def config_file(preset: str, **changes: Any) -> str:
    """The published form of a preset's settings."""
    config = PRESETS[preset]()
    model, times, optim, loss = config.model, config.times, config.optim, config.loss
    statistics = LATENT_STATISTICS[config.data.latents]  # type: ignore[index]
    kwargs = {"qk_norm": True, "do_mod_norm": True, "learn_guidance": True, "time_specinit": model.spectral_time_mlp}
    network = {"model_type": "DiT_XL_2_18h", "do_scale_param": loss.scaled, "detach_jvp": False, "data_type": "bf16"}
    training = {"ema_beta": optim.ema, "ema_target_beta": optim.target_ema, "batch_size": config.run.batch}
    laws = {"gap_P_mean": times.gap_mu, "gap_P_std": times.gap_sigma, "s_P_mean": times.s_mu, "s_P_std": times.s_sigma}
    content = {
        "encoder": {"raw_mean": list(statistics.mean), "raw_std": list(statistics.deviation)},
        "network": {**network, "compile": True, "model_kwargs": kwargs},
        "loss": {**laws, "cfg": loss.w, "label_dropout": loss.label_dropout},
        "optimizer": {"lr": "1e-4", "betas": list(optim.betas), "eps": "1e-8", "weight_decay": 0.0},
        "training": training if optim.clip is None else training | {"max_grad_norm": optim.clip},
    }
    for name, value in changes.items():
        content[name] |= value
    return yaml.safe_dump(content)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A peer that agrees, and small networks."""
    folder = tmp_path / "peer"
    for name, text in {
        "training/__init__.py": "",
        "training/dit.py": "import torch\nsdpa_jvp = None\n",
        "training/wrapper.py": WRAPPER.replace("FACTOR", "1"),
        **{f"configs/{name}.yaml": config_file(preset) for preset, name in published.CONFIGS.items()},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(published, "NETWORKS", {"small": published.NETWORKS["small"]})
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("training", "timm")]:
        del sys.modules[name]


def judged(checkout: Path) -> tuple[int, pd.DataFrame]:
    """The exit status and the rows."""
    out = checkout.parent / "rows.csv"
    status = command_line.main(["published", "--peer", str(checkout), "--out", str(out)])
    return status, pd.read_csv(out)


def test_a_peer_that_gives_the_same_numbers_agrees(checkout: Path) -> None:
    status, rows = judged(checkout)
    # The stand-in's module is no plain one for the unpickler: of that row only that it was judged counts here.
    assert set(rows["check"]) == {"same weights", "pickle", "start", "settings"}
    assert rows[rows["check"] != "pickle"]["ok"].all(), rows[["quantity", "reason", "error", "budget"]].to_string()
    assert len(rows[rows["check"] == "same weights"]) == 8
    assert {"peer_commit", "commit", "torch_version"} <= set(rows.columns)
    assert status == (0 if rows["ok"].all() else 1)


def test_another_loss_another_start_and_other_settings_are_caught(checkout: Path) -> None:
    text = (checkout / "training/wrapper.py").read_text().replace("(s != t) * 1", "(s != t) * 1.00001")
    start = "        self.blocks[1].mlp.fc1.weight.data *= 1.01\n\nclass TVMWrapper"
    (checkout / "training/wrapper.py").write_text(text.replace("\nclass TVMWrapper", start))
    (checkout / "configs/im256_w2.yaml").write_text(config_file("imagenet256-w2", optimizer={"lr": "2e-4"}))
    status, rows = judged(checkout)
    wrong = rows[~rows["ok"] & (rows["check"] != "pickle")]
    assert status == 1
    assert set(wrong["quantity"]) == {"terminal-velocity term", "gradients", "44 tensors", "21 values"}
    assert list(wrong[wrong["check"] == "settings"]["subject"]) == ["imagenet256-w2"]
    assert wrong[wrong["check"] == "settings"]["reason"].item() == "lr: 0.0001, published 0.0002"
    assert wrong[wrong["check"] == "start"]["reason"].str.contains("blocks.1.mlp.fc1.weight differs").all()


def test_a_folder_that_is_no_checkout_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["published", "--peer", str(tmp_path), "--out", str(tmp_path / "rows.csv")]) == 2
    assert "expected a checkout of lumalabs/tvm" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()
    assert torch.is_autocast_enabled("cuda") is False


def test_the_recorded_comparison_covers_everything_and_agreed() -> None:
    (file,) = DATA.glob("*/published.csv")
    rows = pd.read_csv(file)
    assert rows["ok"].all()
    assert set(rows["quantity"]) >= {
        "output", "terminal-velocity term", "flow-matching term", "gradients", "converted weights",
    }  # fmt: skip
    assert set(rows[rows["check"] == "settings"]["subject"]) == published.CONFIGS.keys()
    assert set(rows[rows["check"] == "pickle"]["subject"]) == published.NETWORKS.keys()
