from typing import Any

import pytest

from bench.cases import Case
from bench.providers import PROVIDERS
from tests.bench import planted


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", ""),
        ({}, "mps", "runs on cpu and cuda, not on mps"),
        ({"dtype": "float64"}, "cpu", "takes float16, float32, not float64"),
        ({"causal": True}, "cpu", "has no causal mask"),
        ({"kv_heads": 1}, "cpu", "as many key heads"),
        ({"mode": "fwd+bwd"}, "cpu", "has no mode fwd+bwd: no gradient"),
        ({"mask": "additive"}, "cpu", "takes no mask additive: no infinities"),
        ({"mask": "bool"}, "cpu", ""),
        ({"head_dim": 72}, "cpu", "takes head dims 8, 16, not 72"),
    ],
)
def test_a_provider_says_what_it_cannot_do(changes: dict[str, Any], device: str, reason: str) -> None:
    peer = planted.providers.Provider(
        name="peer",
        load=lambda: planted.right,
        dtypes=("float16", "float32"),
        causal=False,
        gqa=False,
        modes=("fwd",),
        why_modes="no gradient",
        masks=("none", "bool"),
        why_masks="no infinities",
        head_dims=(8, 16),
    )
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 8, "keys": 8, "head_dim": 8}
    case = Case(**{"mode": "fwd", "dtype": "float32", "causal": False, **sizes, **changes})
    assert reason in peer.why_not(case, device)
    assert bool(peer.why_not(case, device)) == bool(reason)


def test_a_mask_and_a_causal_one_together_are_for_those_who_can() -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 8, "keys": 8, "head_dim": 8}
    case = Case(mode="fwd", dtype="float32", causal=True, mask="bool", **sizes)
    assert "not both" in PROVIDERS["math"].why_not(case, "cpu")
    assert not PROVIDERS["flashjvp"].why_not(case, "cpu")
