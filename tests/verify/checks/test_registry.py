"""Every check of a call inside PyTorch holds; `python -m verify faults` shows that each can fail."""

import pytest
import torch

from verify.cases.catalogue import CASES
from verify.cases.inputs import make_inputs
from verify.checks.registry import IN_PYTORCH
from verify.oracles.attention import Subject

BY_NAME = {case.name: case for case in CASES}
NAMES = (
    "square", "plain", "gqa", "batch_none", "batch_many", "batch_empty", "mask_bool_full", "packed",
    "tangents_q", "tangents_kv", "cotangent_o_tangents_qkv", "cotangent_o_t_tangents_v",
)  # fmt: skip
NOTHING_TO_MAP = ("batch_none", "batch_many", "batch_empty", "mask_bool_full")


@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", IN_PYTORCH)
def test_holds_on_tiled(check: str, name: str) -> None:
    findings = IN_PYTORCH[check](make_inputs(BY_NAME[name], torch.float32), Subject("tiled"))
    assert [finding for finding in findings if not finding.ok] == []
    of_keys = check in ("learned-bias", "broadcast-bias", "dropout", "packed")
    nothing = name in NOTHING_TO_MAP if check == "func.vmap" else of_keys and 0 in BY_NAME[name].batch
    assert bool(findings) or nothing
