"""Calls of the warp-specialised kernels that lack tangents, or want some gradients only."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashjvp.backends import triton as triton_backend
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.hopper_tables import PIPELINES
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import replayed
from verify.emulator.gluon import emulated
from verify.oracles.attention import Subject, operands

NAMES = ("q", "k", "v", "q_t", "k_t", "v_t")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator serves machines without a GPU")


@contextlib.contextmanager
def pipelines_in_use(ordered: bool) -> Iterator[list[str]]:
    """On CPU tensors, too. Yields the families that are launched."""
    launched: list[str] = []

    def launch(original: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **flags: Any) -> None:
        launched.extend([family] if "STAGES" in flags else [])
        original(call, kernel, family, *rest, **flags)

    torch.use_deterministic_algorithms(ordered, warn_only=True)
    # The backward in one pass serves all gradients alone, so that with fewer of them others have other roundings.
    tiles = {
        width: {
            kind: {family: tile for family, tile in families.items() if family != "backward_one_pass"}
            for kind, families in kinds.items()
        }
        for width, kinds in PIPELINES["sm_90"].items()
    }
    with emulated(), replaced.pipelines(tiles, dq_accum_from={}), replaced.launch(launch):
        yield launched


@pytest.mark.parametrize(("d", "dv", "ordered"), [(64, 64, True), (72, 72, False), (128, 64, False)])
def test_gradients_that_nobody_wants_change_no_other(d: int, dv: int, ordered: bool) -> None:
    """Kernels that write no wanted gradient are not launched. One program has all keys, so that sums have one order."""
    inputs = make_inputs(Case("some", batch=(1,), q_heads=1, kv_heads=1, m=70, n=70, d=d, dv=dv), torch.float32)
    tensors, options = [x.detach() for x in operands(inputs)], (None, None, None, False, d**-0.5, 0.0)

    def gradients(*wanted: str) -> dict[str, Tensor]:
        flags = (*(name in wanted for name in NAMES), False, False)
        grads = triton_backend.backward_jvp(inputs.d_o, inputs.d_o_t, *tensors, *outputs, *options, flags)
        found = {name: grad for name, grad in zip(NAMES, grads, strict=False) if grad is not None}
        assert found.keys() == {*wanted}
        return found

    of_keys = 1 if d == 64 else 2
    with pipelines_in_use(ordered) as launched:
        outputs = triton_backend.forward_jvp(*tensors, *options)
        every = gradients(*NAMES)
        for wanted, families in ((("q",), 1), (("v_t", "q_t"), 2), (("k", "v"), of_keys), (("q", "k_t"), 2)):
            launched.clear()
            found = gradients(*wanted)
            assert 1 <= len(launched) <= families
            # Without d_k and d_k_t, query gradients come from another kernel than with them.
            same = [name for name in wanted if ordered or name not in ("q", "q_t") or "k_t" in wanted]
            assert all(torch.equal(found[name], every[name]) for name in same)


def test_a_call_without_some_tangents_is_replayed() -> None:
    case = Case("two", batch=(1,), q_heads=1, kv_heads=1, m=40, n=70, d=64, dv=64, tangents=("q", "v"))
    found = replayed(make_inputs(case, torch.float32), Subject("triton"))
    assert found and all(identity.ok for identity in found)
