"""The cost of tiles by count: what it grows with, and what fits nowhere."""

import pytest

from bench.tile_cost import RATES, WORK, cost
from flashjvp.kernels.launch.tables import TILES


def of(*tile: int, arch: str = "sm_86", family: str = "forward", width: int = 64, kind: str = "half") -> float:
    found = cost(arch, kind, family, width, tile)
    assert found is not None
    return found


def test_more_rows_share_what_is_streamed() -> None:
    assert of(128, 32, 8, 2) < of(64, 32, 8, 2) < of(32, 32, 8, 2)
    assert of(32, 64, 8, 2, family="backward_key") < of(32, 32, 8, 2, family="backward_key")  # owns keys


def test_a_pipeline_hides_loads() -> None:
    assert of(64, 32, 8, 2) < of(64, 32, 8, 1)


def test_wider_heads_and_slower_products_cost_more() -> None:
    assert of(32, 32, 8, 2) < of(32, 32, 8, 2, width=128)
    assert of(32, 32, 8, 2, arch="sm_80") < of(32, 32, 8, 2, arch="sm_86") < of(32, 32, 8, 2, kind="tf32")


@pytest.mark.parametrize("tile", [(128, 128, 4, 1), (128, 128, 8, 3)], ids=["registers", "shared memory"])
def test_what_cannot_fit_has_no_cost(tile: tuple[int, ...]) -> None:
    assert cost("sm_86", "half", "forward", 256, tile) is None


def test_every_architecture_and_family_of_the_tables_is_counted() -> None:
    assert RATES.keys() == TILES.keys()
    families = {family for kinds in TILES.values() for table in kinds.values() for family in table}
    assert families - WORK.keys() == {"backward_preprocess"}
    assert cost("sm_86", "half", "backward_preprocess", 64, (64, 0, 4, 1)) is not None
