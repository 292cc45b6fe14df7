"""`flashjvp.check` finds what it knows, each in a model made for it, at its module, and nothing in right models."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashjvp
from tests.flashjvp.diagnosis import small_models as small
from tests.flashjvp.diagnosis.small_models import WIDTH, Within

Found = set[tuple[str, str, str]]  # severity, kind, path
RIGHT, OFF, NOT_COMPARED = "right", "wrong", "not compared"


@dataclass(frozen=True)
class Case:
    """A model and what is to be found in it.

    found: all findings but those that say that something is fine.
    derivatives: "right", "wrong", or "not compared", where PyTorch raises an error.
    mended: what is found within `replaced()`.
    """

    name: str
    model: Within
    found: Found
    derivatives: str
    mended: Found
    mended_derivatives: str = RIGHT
    training: bool = False


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


SDPA = "stock attention"
NO_PATH = "harmless", "fast path of inference", "inner"
CASES = [
    Case("no trouble", Within(lambda m, y: F.silu(m.other(y))), set(), RIGHT, set()),
    Case("rms norm", Within(small.inner, nn.RMSNorm(WIDTH)), set(), RIGHT, set()),
    Case("group norm", Within(small.channels_first, nn.GroupNorm(2, WIDTH)), set(), RIGHT, set()),
    Case("batch norm, eval", Within(small.inner, nn.BatchNorm1d(5)), set(), RIGHT, set()),
    Case("linear attention", Within(small.linear_attention), set(), RIGHT, set()),
    Case("in place of its own", Within(small.written_into_place), set(), RIGHT, set()),
    Case("layer norm", Within(small.inner, layer_norm()), {("wrong", "layer norm", "inner")}, OFF, set()),
    Case("layer norm by function", Within(lambda m, y: F.layer_norm(y, (WIDTH,))), {("wrong", "layer norm", "")}, OFF,
         set()),
    Case("batch norm", Within(small.inner, nn.BatchNorm1d(5, track_running_stats=False)),
         {("wrong", "batch norm in training", "inner")}, OFF, set(), training=True),
    Case("instance norm", Within(small.inner, nn.InstanceNorm1d(5)), {("wrong", "instance norm", "inner")}, OFF,
         set()),
    Case("stock attention", Within(small.of_torch),
         {("refused", SDPA, "")}, RIGHT, set()),
    Case("einsum", Within(small.inner, small.Attention()), {("slow", "dense attention", "inner")}, RIGHT,
         {("slow", "dense attention", "inner")}),
    Case("switch off", Within(small.inner, small.Attention(False)), {("slow", "switch off", "inner")}, RIGHT, set()),
    Case("switch on", Within(small.inner, small.Attention(True)), {("refused", SDPA, "inner")}, RIGHT, set()),
    Case("need_weights", Within(small.mha(), nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
         {("slow", "switch off", "inner"), NO_PATH}, RIGHT, set()),
    Case("need_weights=False", Within(small.mha(need_weights=False), nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
         {("refused", SDPA, "inner"), NO_PATH}, RIGHT, set()),
    Case("encoder layer", Within(small.inner, nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)),
         {("wrong", "layer norm", "inner.norm1"), ("wrong", "layer norm", "inner.norm2"),
          ("refused", SDPA, "inner.self_attn"), NO_PATH}, OFF, set()),
    Case("detach", Within(lambda m, y: y + y.detach()), {("wrong", "tangent cut", "")}, OFF,
         {("wrong", "tangent cut", "")}, OFF),
    Case("data", Within(lambda m, y: y + y.data), {("wrong", "tangent cut", "")}, OFF,
         {("wrong", "tangent cut", "")}, OFF),
    Case("item", Within(lambda m, y: y * y.sum().item()), {("wrong", "tangent cut", "")}, OFF,
         {("wrong", "tangent cut", "")}, OFF),
    Case("harmless detach", Within(lambda m, y: y * y.detach().sign().square()), {("harmless", "tangent cut", "")},
         RIGHT, {("harmless", "tangent cut", "")}),
    Case("no_grad", Within(small.without_gradient), {("wrong", "gradient cut", "other")},
         OFF, {("wrong", "gradient cut", "other")}, OFF),
    Case("Function without jvp", Within(lambda m, y: small.WithoutJvp.apply(y)),
         {("refused", "autograd.Function without jvp", "")}, NOT_COMPARED,
         {("refused", "autograd.Function without jvp", "")}, NOT_COMPARED),
    Case("Function with a wrong jvp", Within(lambda m, y: small.WrongJvp.apply(y)),
         {("wrong", "autograd.Function with its own jvp", "")}, OFF,
         {("wrong", "autograd.Function with its own jvp", "")}, OFF),
    Case("Function with a jvp", Within(lambda m, y: small.RightJvp.apply(y)), set(), RIGHT, set()),
    Case("checkpoint", Within(small.checkpointed(False)), {("refused", "checkpointing", "")}, NOT_COMPARED, set()),
    Case("reentrant checkpoint", Within(small.checkpointed(True)), {("refused", "checkpointing", "")}, NOT_COMPARED,
         set()),
    Case("no forward AD", Within(lambda m, y: torch.cdist(y, y) @ y), {("refused", "operator without forward AD", "")},
         NOT_COMPARED, {("refused", "operator without forward AD", "")}, NOT_COMPARED),
    Case("no backward of the JVP", Within(lambda m, y: F.glu(small.stretched(y))),
         {("refused", "JVP without backward", "")}, NOT_COMPARED,
         {("refused", "JVP without backward", "")}, NOT_COMPARED),
    Case("batch norm with statistics", Within(small.inner, nn.BatchNorm1d(5)),
         {("refused", "in-place on a captured tensor", "inner"), ("wrong", "batch norm in training", "inner")}, OFF,
         set(), training=True),
    Case("in place on a buffer", Within(small.inner, small.Counts()),
         {("refused", "in-place on a captured tensor", "inner")}, RIGHT,
         {("refused", "in-place on a captured tensor", "inner")}),
    Case("dropout", Within(lambda m, y: F.dropout(y, 0.2, m.training)), set(), RIGHT, set(), training=True),
]  # fmt: skip


def found_in(diagnosis: flashjvp.Diagnosis) -> Found:
    found = diagnosis.findings
    return {(one.severity, one.kind, one.path) for one in found if one.severity != "fine"}


def derivatives(diagnosis: flashjvp.Diagnosis) -> str:
    verdicts = {one.verdict for one in diagnosis.comparisons}
    assert "undecided" not in verdicts
    return NOT_COMPARED if not verdicts else OFF if OFF in verdicts else RIGHT


@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finds_it_and_what_replaced_mends(case: Case) -> None:
    case.model.train(case.training)
    x = torch.randn(3, 5, WIDTH)
    report = flashjvp.check(case.model, (x,), (torch.randn_like(x),), replaced=True)
    as_it_is, within = report.diagnoses
    assert (found_in(as_it_is), derivatives(as_it_is)) == (case.found, case.derivatives)
    assert (found_in(within), derivatives(within)) == (case.mended, case.mended_derivatives)
    for diagnosis in report.diagnoses:
        bad = {severity for severity, _, _ in found_in(diagnosis)} & {"wrong", "refused"}
        assert diagnosis.ok == (not bad and derivatives(diagnosis) == RIGHT)


def attention_of(self: Within, y: torch.Tensor, p: float, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = y.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2).expand(3, *y.shape[:1], 2, y.shape[1], WIDTH // 2)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p).transpose(1, 2).flatten(2)


def learned(self: Within, y: torch.Tensor) -> torch.Tensor:
    return attention_of(self, y, 0.0, self.inner.weight * 1)


def with_tangent(self: Within, y: torch.Tensor) -> torch.Tensor:
    return attention_of(self, y, 0.0, (y @ y.mT)[:, None])


OPTIONS = {
    "dropout": (Within(lambda m, y: attention_of(m, y, 0.2, None)), {"dropout"}),
    "learned mask": (Within(learned, nn.Linear(5, 5)), {"learned mask"}),
    "mask with a tangent": (Within(with_tangent), {"learned mask"}),
    "boolean mask": (Within(lambda m, y: attention_of(m, y, 0.0, torch.ones(5, 5, dtype=torch.bool))), set()),
    "nn.MultiheadAttention": (
        Within(small.mha(), nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)), {"dropout"}
    ),
    "nn.MultiheadAttention, need_weights=False": (
        Within(small.mha(need_weights=False), nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)),
        {"dropout"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_dropout_and_learned_masks_are_named_and_served(name: str) -> None:
    model, expected = OPTIONS[name]
    x = torch.randn(3, 5, WIDTH)
    report = flashjvp.check(model.train(), (x,), (torch.randn_like(x),), replaced=True)
    for diagnosis in report.diagnoses:
        found = [one for one in diagnosis.findings if one.kind in ("dropout", "learned mask")]
        assert {one.kind for one in found} == expected, diagnosis.way
        assert all(one.severity == "fine" and "nothing to do" in one.advice for one in found)
    assert report.ok


def test_norms_are_harmless_where_the_tangent_is_detached() -> None:
    x = torch.randn(3, 5, WIDTH)
    report = flashjvp.check(Within(small.inner, layer_norm()), (x,), (torch.randn_like(x),), detached=True)
    assert found_in(report.diagnoses[0]) == {("harmless", "layer norm", "inner")}
    assert report.ok
    assert [one.what for one in report.comparisons] == ["JVP", "gradient of the output"]


def test_a_norm_before_which_nothing_is_trained_is_harmless() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.after = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.norm(x))

    x = torch.randn(3, 5, WIDTH)
    report = flashjvp.check(First(), (x,), (torch.randn_like(x),))
    assert found_in(report.diagnoses[0]) == {("harmless", "layer norm", "norm")} and report.ok


def test_calls_are_counted_by_module() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[nn.LayerNorm(WIDTH) for _ in range(2)])
    model.append(model[1])  # called twice, under one of its names
    x = torch.randn(3, WIDTH)
    report = flashjvp.check(model, x, torch.randn_like(x))
    assert {(one.path, one.calls) for one in report.findings} == {("1", 2), ("2", 1)}
    assert "*" not in str(flashjvp.check(model[:2], x, torch.randn_like(x)))


def test_zeros_that_hide_an_error_are_filled() -> None:
    """adaLN-Zero: the last layer is all zero, and so are all gradients before it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(3, WIDTH)
    assert not flashjvp.check(model, x, torch.randn_like(x)).ok
    assert not model[2].weight.any()


def test_group_norm_of_a_strided_input() -> None:
    """Its JVP is refused by some releases of PyTorch, and right in others."""
    model, x = Within(small.channels_last, nn.GroupNorm(2, 4)), torch.randn(3, 5, WIDTH)
    try:
        torch.func.jvp(model, (x,), (x,))
        expected: Found = set()
    except RuntimeError:
        expected = {("refused", "JVP of a strided input", "inner")}
    report = flashjvp.check(model, x, x)
    assert found_in(report.diagnoses[0]) == expected and report.ok == (not expected)
