"""Every oracle of identities.py passes on right attention, in every type, and fails on a wrong one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from verify.budget import tolerance
from verify.cases.case import Case
from verify.cases.catalogue import CASES
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import Attention, Forward, Results, Subject
from verify.oracles.identities import GRADCHECKS, IDENTITIES
from verify.run.plan import TINY

BY_NAME = {case.name: case for case in CASES}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GQA = Case("gqa", batch=(2,), q_heads=4, kv_heads=2, m=17, n=24, d=16, dv=8, mask="bool")


@dataclass(frozen=True)
class Wrong(Subject):
    """The tiled backend with its inputs, results, forward results or the plain function changed."""

    backend: Any = "tiled"
    change_inputs: Callable[[Inputs], Inputs] = lambda inputs: inputs
    change_results: Callable[[Results], Results] = lambda results: results
    change_forward: Callable[[Forward], Forward] = lambda forward: forward
    change_attention: Callable[[Attention], Attention] = field(default=lambda attention: attention)

    def results(self, inputs: Inputs) -> Results:
        return self.change_results(super().results(self.change_inputs(inputs)))

    def forward(self, inputs: Inputs) -> Forward:
        return self.change_forward(super().forward(inputs))

    def attention(self, inputs: Inputs) -> Attention:
        return self.change_attention(super().attention(inputs))


def without_tangent_of_v(inputs: Inputs) -> Inputs:
    if inputs.v_t is None or inputs.q_t is None:
        return inputs
    return replace(inputs, v_t=torch.zeros_like(inputs.v_t))


def clipped_mask(inputs: Inputs) -> Inputs:
    return inputs if inputs.mask is None else replace(inputs, mask=inputs.mask.clamp(max=20.0))


def changed(**functions: Callable[[Tensor], Tensor]) -> Callable[[Results], Results]:
    def change(results: Results) -> Results:
        tensors: dict[str, Any] = {name: getattr(results, name) for name in functions}
        return replace(results, **{name: None if x is None else functions[name](x) for name, x in tensors.items()})

    return change


def by_place(x: Tensor) -> Tensor:
    return x * (1 + 0.1 * torch.arange(x.shape[-2])[:, None] / x.shape[-2])


def next_head(x: Tensor) -> Tensor:
    return x.roll(1, -3)


def last_bit() -> Callable[[Tensor], Tensor]:
    """Moves one element by the last bit in every second run."""
    runs = itertools.count()

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[3] = torch.nextafter(x.view(-1)[3], x.new_tensor(torch.inf)) if next(runs) % 2 else x.view(-1)[3]
        return x

    return change


def hidden(power: int) -> Callable[[Attention], Attention]:
    """Adds (q - the value of q)^power: 0, as are its derivatives but that of order `power`."""

    def change(attention: Attention) -> Attention:
        return lambda q, k, v: attention(q, k, v) + 0.01 * (q - q.detach()).pow(power).sum()

    return change


def scaled(forward: Forward, name: str, factor: float) -> Forward:
    return forward._replace(**{name: factor * getattr(forward, name)})


WRONG: list[tuple[str, str, Subject]] = [
    ("adjoint", "tangent of v ignored", Wrong(change_inputs=without_tangent_of_v)),
    ("adjoint", "o_t is zero", Wrong(change_results=changed(o_t=torch.zeros_like))),
    ("linear", "a constant added to o_t", Wrong(change_results=changed(o_t=lambda x: x + 0.1))),
    ("permutation", "the place of a key counts", Wrong(change_results=changed(d_v=by_place))),
    ("shift", "large biases clipped", Wrong(change_inputs=clipped_mask)),
    ("slices", "the gradient of another head", Wrong(change_results=changed(d_k_t=next_head))),
    ("merge", "lse in base 2", Wrong(change_forward=lambda x: scaled(x, "lse", 1.4427))),
    ("merge", "mu halved", Wrong(change_forward=lambda x: scaled(x, "mu", 0.5))),
    (
        "merge",
        "lse of a row without a key is 0",
        Wrong(change_forward=lambda x: x._replace(lse=x.lse.nan_to_num(neginf=0.0))),
    ),
    ("differences", "tangent of v ignored", Wrong(change_inputs=without_tangent_of_v)),
    ("differences", "scale of d_q off", Wrong(change_results=changed(d_q=lambda x: 1.1 * x))),
    ("differences", "d_v_t is zero", Wrong(change_results=changed(d_v_t=torch.zeros_like))),
    ("forward-mode", "a derivative of its own", Wrong(change_attention=hidden(1))),
    ("forward-mode", "a second derivative of its own", Wrong(change_attention=hidden(2))),
    ("agreement", "o a little larger", Wrong(change_results=changed(o=lambda x: 1.05 * x))),
    ("agreement", "o_t is NaN", Wrong(change_results=changed(o_t=lambda x: x * torch.nan))),
    ("agreement", "no d_k_t", Wrong(change_results=lambda x: replace(x, d_k_t=None))),
    ("determinism", "a last bit", Wrong(change_results=changed(d_q_t=last_bit()))),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ("gqa", "causal_33_80", "mask_bool_empty_rows", "batch_empty"))
@pytest.mark.parametrize("check", IDENTITIES)
def test_right_attention_keeps_every_identity(check: str, name: str, dtype: torch.dtype) -> None:
    found = IDENTITIES[check](make_inputs(BY_NAME[name], dtype, seed=3), Subject("tiled"))
    assert found or name == "batch_empty"
    assert [identity for identity in found if not identity.ok] == []


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("check", "fault", "subject"), WRONG, ids=[f"{check}, {fault}" for check, fault, _ in WRONG])
def test_wrong_attention_breaks_the_identity(check: str, fault: str, subject: Subject, dtype: torch.dtype) -> None:
    case = replace(GQA, mask_shape="empty_rows") if "without a key" in fault else GQA
    case = replace(case, mask="additive") if check == "shift" else case
    inputs = make_inputs(case, dtype)
    assert all(identity.ok for identity in IDENTITIES[check](inputs, Subject("tiled")))
    failing = [identity for identity in IDENTITIES[check](inputs, subject) if not identity.ok]
    assert failing
    assert not all(x.error is not None and x.budget is not None and x.error < 2 * x.budget for x in failing)


@pytest.mark.parametrize("backend", ("reference", "tiled"))
@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.parametrize("check", GRADCHECKS)
def test_right_attention_passes_gradcheck(check: str, case: Case, backend: Any) -> None:
    (identity,) = GRADCHECKS[check](make_inputs(case, torch.float64), Subject(backend))
    assert identity.ok, identity.reason


@pytest.mark.parametrize(
    ("power", "caught"), [(1, ["gradcheck", "gradcheck-forward", "gradcheck-both"]), (2, ["gradcheck-both"])]
)
def test_gradcheck_finds_a_wrong_derivative_of_its_order(power: int, caught: list[str]) -> None:
    inputs, subject = make_inputs(TINY[0], torch.float64), Wrong(change_attention=hidden(power))
    found = {check: oracle(inputs, subject)[0] for check, oracle in GRADCHECKS.items()}
    assert [check for check, identity in found.items() if not identity.ok] == caught
    assert all("mismatch" in found[check].reason for check in caught)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_tolerance_of_gradcheck_is_far_below_any_derivative(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    results = Subject("reference").results(inputs)
    smallest = min(x.abs().max().item() for x in (results.d_q, results.d_k, results.d_v))
    assert tolerance.gradcheck(inputs)["atol"] < 1e-4 * smallest


def test_identities_say_nothing_without_what_they_are_about() -> None:
    plain = make_inputs(BY_NAME["plain"], torch.float32)
    assert IDENTITIES["adjoint"](plain, Subject("tiled")) == IDENTITIES["linear"](plain, Subject("tiled")) == []
    one_key = make_inputs(BY_NAME["lengths_1000_1"], torch.float32)
    assert IDENTITIES["merge"](one_key, Subject("tiled")) == []
