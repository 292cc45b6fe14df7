"""The dispatcher operators themselves: opcheck, fake strides, and the private PyTorch names that the wiring stands
on."""

from typing import Any

import pytest
import torch
from torch.library import opcheck

from flashjvp import operators

BACKENDS = ("reference", "tiled")


def canonical() -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 9, 6), torch.randn(2, 2, 9, 5)
    packed = torch.randn(2, 7, 4, 6).transpose(1, 2)
    return {"q": packed, "k": k, "v": v, "q_t": q, "k_t": None, "v_t": v.cos(), "mask": torch.rand(2, 1, 7, 9) > 0.2}


def leaf(x: Any) -> Any:
    return None if x is None else x.detach().requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_opcheck_of_the_forward_operators(backend: str, is_causal: bool) -> None:
    x = canonical()
    options = (x["mask"], is_causal, None, backend)
    opcheck(operators.FORWARD, (leaf(x["q"]), leaf(x["k"]), leaf(x["v"]), *options))
    six = tuple(leaf(x[name]) for name in ("q", "k", "v", "q_t", "k_t", "v_t"))
    opcheck(operators.FORWARD_JVP, (*six, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cotangents", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward_operators(backend: str, cotangents: tuple[bool, bool]) -> None:
    x = canonical()
    six = tuple(x[name] for name in ("q", "k", "v", "q_t", "k_t", "v_t"))
    options = (x["mask"], False, 0.3, backend)
    o, o_t, lse, mu = operators.FORWARD_JVP(*six, *options)
    d_o, d_o_t = (torch.randn_like(o) if given else None for given in cotangents)
    wanted = [True, False, True, True, False, True]
    opcheck(operators.BACKWARD_JVP, (d_o, d_o_t, *six, o, o_t, lse, mu, *options, wanted))
    if d_o is not None:
        opcheck(operators.BACKWARD, (d_o, *six[:3], o, lse, *options, wanted[:3]))


def test_private_names_exist() -> None:
    """One place to look when a new PyTorch breaks the wiring."""
    for name in (
        "_AutoDispatchBelowAutograd", "_ExcludeDispatchKeyGuard", "_after_autograd_keyset", "_any_requires_grad",
        "_are_functorch_transforms_active", "_is_fwd_grad_enabled", "_len_torch_dispatch_stack",
    ):  # fmt: skip
        assert hasattr(torch._C, name), name
    assert hasattr(torch._VF, "_unpack_dual") and hasattr(torch._VF, "_make_dual")
    assert hasattr(torch.autograd.forward_ad, "_current_level")
    assert hasattr(torch._functorch.utils, "enable_single_level_autograd_function")
