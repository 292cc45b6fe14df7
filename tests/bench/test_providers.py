import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from bench import gate, peers
from bench.cases import REDUCED_LENGTH, Case
from bench.providers import EXACT, PLAIN, PROVIDERS
from flashjvp.kernels.launch import hopper_tables
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


def test_the_gate_judges_the_kernels_that_are_timed() -> None:
    """From DQ_ACCUM_FROM queries on, flashjvp adds query gradients up: the reduced shape must have as many, too."""
    sizes = {"batch": 8, "heads": 2, "kv_heads": 2}
    lengths = ((1023, 255), (1024, 1024), (2047, 1151), (2048, 2048), (4100, 2052), (8192, 2176))
    for (length, expected), (width, first) in itertools.product(lengths, hopper_tables.DQ_ACCUM_FROM.items()):
        case = Case(mode="bwd", dtype="bfloat16", causal=False, queries=length, keys=length, head_dim=width, **sizes)
        for name in ("flashjvp", "flashjvp-triton", "flashjvp-func-jvp"):
            small = gate.gated(case, PROVIDERS[name].gate_length(case, "cuda"))
            assert (small.queries, small.keys) == (expected, expected)
            assert (small.queries >= first) == (length >= first)
        assert PROVIDERS["flashjvp"].gate_length(case, "cpu") == REDUCED_LENGTH  # where there are no such kernels
        assert PROVIDERS["math"].gate_length(case, "cuda") == REDUCED_LENGTH


def test_every_missing_mode_has_its_reason() -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 8, "keys": 8, "head_dim": 64}
    for provider in PROVIDERS.values():
        for mode in EXACT + PLAIN:
            case = Case(mode=mode, dtype="bfloat16", causal=False, **sizes)
            found = provider.why_not(case, "cuda")
            assert bool(found) == (mode not in provider.modes) == (": " in found)
            assert not (case.plain and "gradient" in found)  # which attention without a JVP has


class Tuner:
    """What an autotuner of Triton has that is used."""

    def __init__(self) -> None:
        self.nargs = {"q": 1, "o": 2}
        self.configurations = [Configuration(rows) for rows in (16, 32, 64)]
        self.compiled: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.fn = self

    def prune_configs(self, constants: dict[str, Any]) -> list["Configuration"]:
        return self.configurations[:2]

    def run(self, *args: int, **options: Any) -> None:
        self.compiled.append((args, options))


@dataclass
class Configuration:
    rows: int

    def all_kwargs(self) -> dict[str, int]:
        return {"BLOCK": self.rows}


def test_an_autotuned_peer_compiles_side_by_side_what_it_will_time() -> None:
    pytest.importorskip("triton")
    tuner: Any = Tuner()
    for _ in range(2):  # loaded for each shape
        peers.compile_side_by_side(tuner)
    assert tuner.prune_configs({"grid": (1,), "warmup": False}) == tuner.configurations[:2]
    assert tuner.compiled == [((1, 2), {"grid": (1,), "warmup": True, "BLOCK": rows}) for rows in (16, 32)]


def test_a_mask_and_a_causal_one_together_are_for_those_who_can() -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 8, "keys": 8, "head_dim": 8}
    case = Case(mode="fwd", dtype="float32", causal=True, mask="bool", **sizes)
    assert "not both" in PROVIDERS["math"].why_not(case, "cpu")
    assert not PROVIDERS["flashjvp"].why_not(case, "cpu")
