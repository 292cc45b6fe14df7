"""What images are judged by: the classifier of their own data, and where its file is given, that of ImageNet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvm_ref.data.dataset import DataConfig
from tvm_ref.experiments import measures
from tvm_ref.experiments.cells import Setting
from tvm_ref.experiments.objectives import EXPERIMENT
from tvm_ref.quality.feature_judge import Distances
from tvm_ref.training.parallel import World

DIGITS = DataConfig(name="digits")
OF_IMAGENET = {"frechet_imagenet": 1.0, "precision_imagenet": 0.5, "recall_imagenet": 0.25, "coverage_imagenet": 0.125}


class Judge:
    """Stands in for both judges."""

    def __init__(self, *given: Any) -> None:
        self.labels = torch.zeros(4, dtype=torch.int64)

    def judge(self, samples: Tensor, *labels: Tensor) -> Distances:
        assert len(samples) == 3
        return Distances(1.0, 0.5, 0.25, 0.125)

    def bootstrap(self, count: int, seed: int) -> Distances:
        assert (count, seed) == (3, 7)
        return Distances(1.0, 0.5, 0.25, 0.125)


def setting(folder: Path, file: Path | None) -> Setting:
    world = World(0, 1, torch.device("cpu"))
    return Setting(scale="quick", world=world, folder=folder, data_path="", imagenet_classifier=file)


@pytest.mark.parametrize("given", [True, False])
def test_a_file_adds_figures_by_their_own_names(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "feature_judge", Judge)
    monkeypatch.setattr(measures, "imagenet_judge", Judge)
    file = tmp_path / "weights.pth"
    run = setting(tmp_path, file if given else None)
    of_real = measures.real_quality(run, DIGITS, 3, 7)
    of_samples = measures._figures(run, DIGITS, torch.zeros(3, 1, 8, 8), torch.zeros(3), 7)
    for found in ({x.figure: x.value for x in of_real}, of_samples):
        assert {name: x for name, x in found.items() if "imagenet" in name} == (OF_IMAGENET if given else {})
        assert found["frechet"] == 1.0
        assert not any("fid" in name.lower() for name in found)


def test_rows_by_another_file_are_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    found = []
    for content in (None, b"one", b"other"):
        if content is not None:
            file.write_bytes(content)
        cells = EXPERIMENT.cells(setting(tmp_path, None if content is None else file))
        found.append([dict(cell.settings).get("imagenet_classifier") for cell in cells])
    assert set(found[0]) == {None}
    assert len({*found[1]}) == len({*found[2]}) == 1 and None not in found[1] and found[1] != found[2]
