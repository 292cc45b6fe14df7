"""Real processes, over gloo: their results are those of one process, in every way of calling."""

import pytest
import torch

from tests.flashjvp.distributed import works
from tests.flashjvp.distributed.ranks import Ranks
from tests.flashjvp.distributed.works import Call


def assert_like_one(found: list[list[torch.Tensor]], call: Call) -> None:
    exact = works.whole(call)
    for results in found:
        for x, y in zip(results, exact, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("call", [Call(), Call(is_causal=True, zigzag=True), Call(keys=3, queries=2)], ids=str)
@pytest.mark.parametrize("how", [works.ring, works.ulysses])
def test_processes_compute_what_one_does(ranks: Ranks, how: object, call: Call, size: int) -> None:
    assert_like_one(ranks.run(size, how, call), call)


@pytest.mark.parametrize("call", [Call(), Call(is_causal=True, zigzag=True)], ids=str)
def test_a_ring_and_ulysses_on_a_mesh(ranks: Ranks, call: Call) -> None:
    assert_like_one(ranks.run(4, works.mixed, call), call)


WAYS = (works.by_func_jvp, works.by_dual_level, works.checkpointed)
IN_WAYS = [(how, way) for how in (works.ring, works.ulysses) for way in WAYS]
IN_WAYS.append((works.ring, works.compiled))


@pytest.mark.parametrize(
    ("how", "way"), [*IN_WAYS, pytest.param(works.ulysses, works.compiled, marks=pytest.mark.slow)]
)
def test_in_every_way_of_calling(ranks: Ranks, how: object, way: object) -> None:
    call = Call(is_causal=True, zigzag=True)
    assert_like_one(ranks.run(2, how, call, way), call)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (None,), (0, 2), (2, 1), (None, 2)], ids=str)
def test_dtensors(ranks: Ranks, dims: tuple[int | None, ...]) -> None:
    call = Call(is_causal=True)
    assert_like_one(ranks.run(len(dims) * 2, works.of_dtensors, call, dims), call)


def test_tangents_of_all_rows(ranks: Ranks) -> None:
    for found in ranks.run(3, works.tangents_of_all_rows):
        assert all(torch.equal(x, 2 * torch.arange(7.0)) for x in found)
