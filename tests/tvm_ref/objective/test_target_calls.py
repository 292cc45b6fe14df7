"""Which images the target network is run for: those of both terms at once, and none whose result counts nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tvm_ref.objective.test_loss import batch, differentiated, drawn, networks
from tvm_ref.objective import loss
from tvm_ref.objective.loss import LossConfig
from verify.budget.network_tolerance import network_budget, relative_error


@pytest.mark.parametrize(("kind", "guided", "unguided"), [("tvm", 12, 6), ("flow", 6, 0), ("meanflow", 6, 0)])
def test_the_target_runs_once_and_not_for_what_counts_nothing(kind: Any, guided: int, unguided: int) -> None:
    """Images that the target sees: of both terms in one call, and with w = 1 none without class."""
    network, target = networks()
    given = batch()._replace(w=torch.ones(6, dtype=torch.float64))
    seen: list[int] = []

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        result: Tensor = target(x, *rest)
        return result

    found = []
    for config in (LossConfig(objective=kind, w=1.5), LossConfig(objective=kind, w=1.0)):
        terms = loss.terms(network, watched, given, config)  # type: ignore[arg-type]
        found.append(differentiated(terms, network))
    assert seen == [guided] + [unguided] * (unguided > 0)
    if kind == "tvm":  # products of another number of rows
        budget = network_budget([z.float() for z in found[0]], found[0], torch.float32, torch.float64)
        assert relative_error(found[1], found[0]) <= budget
    else:
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("fields", "guides"),
    [({"w": 1.0}, False), ({}, True), ({"w": 0.5}, True), ({"w": 1.0, "w_random": (1.0, 2.0)}, True),
     ({"w": 2.0, "w_random": (1.0, 1.0)}, False)],
)  # fmt: skip
def test_a_configuration_guides_if_any_image_may_have_another_w(fields: dict[str, Any], guides: bool) -> None:
    assert LossConfig(**fields).guides is guides
    assert bool((drawn(64, **fields).w != 1).any()) is guides
