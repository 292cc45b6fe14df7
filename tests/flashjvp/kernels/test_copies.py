"""Calls on copies (backends/copies.py): which calls, with which bits, and of which tensors."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad

import flashjvp
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.schedule import padded_width
from tests.flashjvp.kernels.test_hopper import PIPELINES, PLAIN, expected, interpreted, judge
from tests.flashjvp.kernels.test_hopper_bands import judge_packed
from tests.flashjvp.kernels.test_wide import ALL
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.emulator.gluon import emulated
from verify.oracles.attention import NAMES, Results, run

VARLEN = sys.modules["flashjvp.varlen"]  # whose name in the package may be a function's
ONE: dict[str, Any] = {"batch": (1,), "q_heads": 1, "kv_heads": 1, "m": 40, "n": 70}
ODD = (
    Case("rows_36", batch=(2,), q_heads=2, kv_heads=1, m=130, n=150, d=36, dv=36),
    Case("rows_62", **ONE, d=62, dv=62),
    Case("rows_100", **ONE, d=100, dv=100, is_causal=True),
    Case("values_62", **ONE, d=64, dv=62),
    Case("values_wider", batch=(1,), q_heads=4, kv_heads=2, m=33, n=40, d=1, dv=65),
    Case("values_aligned", **ONE, d=66, dv=24),
    Case("one_row", **ONE | {"m": 1, "n": 1}, d=49, dv=49),
    Case("no_batch", **ONE | {"batch": (), "kv_heads": 2, "q_heads": 2}, d=100, dv=99),
    Case("plain_100", **ONE, d=100, dv=100, **PLAIN),
    Case("sequence_major", batch=(2,), m=33, n=65, d=44, dv=44, layout="sequence_major"),
    Case("packed", batch=(2,), m=33, n=33, d=44, dv=44, layout="packed"),
    Case("mask", **ONE, d=70, dv=70, mask="bool", mask_shape="empty_rows"),
    Case("additive", **ONE, d=36, dv=37, mask="additive"),
    Case("cotangent_o", **ONE, d=63, dv=63, cotangents=("o",)),
    Case("cotangent_o_t", **ONE, d=90, dv=90, cotangents=("o_t",)),
    Case("q_t_alone", **ONE, d=36, dv=36, tangents=("q",)),
    Case("k_t_and_v_t", **ONE, d=127, dv=127, tangents=("k", "v")),
    Case("low_scores", **ONE, d=65, dv=65, kind="low_scores"),
    Case("wide_130", batch=(2,), m=40, n=70, d=130, dv=130),
    Case("wide_255", **ONE, d=255, dv=254, scale=0.3),
    Case("columns_36", **ONE, d=36, dv=36, layout="column_major"),
)
MISFITS = (
    Case("broadcast", batch=(2,), m=64, n=64, d=64, dv=64, layout="expanded"),
    Case("broadcast_tangents", batch=(2,), m=40, n=50, d=64, dv=64, tangent_layout="expanded"),
    Case("columns", batch=(2,), m=40, n=50, d=72, dv=72, layout="column_major"),
    Case("rows_apart", batch=(1,), m=40, n=50, d=128, dv=128, layout="padded"),
    Case("wide_rows_apart", **ONE, d=192, dv=192, tangent_layout="padded"),
)  # fmt: skip
NARROW = (
    Case("dims_1", batch=(2,), q_heads=2, kv_heads=1, m=33, n=40, d=1, dv=1),
    Case("dims_20_9", batch=(2, 1), m=33, n=40, d=20, dv=9, mask="additive"),
    Case("dims_8_31", **ONE, d=8, dv=31, tangents=("v",)),
)  # fmt: skip


@contextlib.contextmanager
def copies_seen() -> Iterator[list[int]]:
    """The width of each tensor that is copied to, in order."""
    seen: list[int] = []

    def launch(original: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **flags: Any) -> None:
        seen.extend([flags["TO_COLUMNS"][0]] if family == "copy_rows" else [])
        original(call, kernel, family, *rest, **flags)

    with replaced.pipelines(PIPELINES, dq_accum_from={}), replaced.launch(launch):
        yield seen


def families(inputs: Inputs, ordered: bool) -> set[str]:
    width = padded_width(max(inputs.q.shape[-1], inputs.v.shape[-1]))
    return ALL if width > 128 else expected(inputs, ordered) if width >= 64 else set()


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", [*ODD, *MISFITS, *NARROW], ids=str)
def test_emulated(case: Case, ordered: bool, dtype: torch.dtype) -> None:
    with emulated():
        judge(case, dtype, ordered, of=families)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("case", [*ODD, *MISFITS, *NARROW], ids=str)
def test_compiled(case: Case, ordered: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, dtype, ordered, "cuda", families)


def padded(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % 8))


def with_zeros(inputs: Inputs) -> Inputs:
    """The call whose user has padded everything."""
    tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    changed = {
        name: padded(x) for name, x in tensors.items() if isinstance(x, Tensor) and name != "mask"
    }  # fmt: skip
    return replace(inputs, scale=inputs.c, **changed)


def assert_same_bits(found: Results, of_padded: Results) -> None:
    for name in NAMES:
        x, y = getattr(found, name), getattr(of_padded, name)
        assert (x is None) == (y is None)
        assert x is None or (x.equal(y[..., : x.shape[-1]]) and not y[..., x.shape[-1] :].any()), name


@interpreted
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("case", [*ODD, *MISFITS, *NARROW], ids=str)
def test_bits_are_those_of_a_call_that_is_padded(case: Case) -> None:
    inputs = make_inputs(case, torch.float16)
    plain = with_zeros(inputs).map(lambda x: x.contiguous())
    with emulated(), copies_seen() as seen:
        found = run(inputs, "triton")
        assert seen or "columns" in case.name
        seen.clear()
        of_padded = run(plain, "triton")
        assert not seen
    assert_same_bits(found, of_padded)


@interpreted
@pytest.mark.parametrize("kind", ["window", "causal window", "block mask"])
def test_windows_and_block_masks(kind: str) -> None:
    case = Case("rows", **ONE | {"m": 150, "n": 150}, d=44, dv=52, is_causal=kind == "causal window")
    inputs = make_inputs(case, torch.float16)
    options: dict[str, Any] = {"window": (20, 9)}
    if kind == "block mask":
        block_mask: Any = create_block_mask(lambda b, h, i, j: j <= i, None, None, 150, 150, device="cpu")
        inputs, options = replace(inputs, mask=block_mask), {}
    with emulated(), copies_seen() as seen:
        found = run(inputs, "triton", **options)
        of_inputs = [48, 48, 56] * 2
        assert seen == [*of_inputs, 52, 52, *of_inputs, *[56] * 4, *[44, 44, 52] * 2]
        assert_same_bits(found, run(with_zeros(inputs), "triton", **options))


@interpreted
@pytest.mark.parametrize("form", [{"d": 44}, {"d": 66, "dv": 100, "heads": 2}, {"d": 62, "tangents": False}])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_packed_sequences(form: dict[str, Any], is_causal: bool) -> None:
    with emulated():
        judge_packed(form, "short", is_causal)


@interpreted
def test_bits_of_packed_sequences() -> None:
    """Rows of no sequence are zeros, too. Nobody checks lengths that are on a GPU; here the check is left out."""
    of_q, of_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 100], [0, 80, 90]))
    generator = torch.Generator().manual_seed(4)
    x = [torch.randn(rows, heads, 36, generator=generator).half() for rows, heads in ((130, 2), *((120, 1),) * 2) * 2]

    def results(x: list[Tensor]) -> list[Tensor]:
        leaves = [y.requires_grad_() for y in x]
        outputs: Any = flashjvp.attention_varlen_jvp(
            *leaves[:3], of_q, of_k, None, None, *leaves[3:], scale=0.2, enable_gqa=True, backend="triton"
        )
        return [*outputs, *torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs])]

    with pytest.MonkeyPatch.context() as patched, emulated(), copies_seen() as seen:
        patched.setattr(VARLEN, "_is_readable", lambda lengths: False)
        found, of_padded = results(x), results([padded(y.detach()) for y in x])
    assert seen
    for one, other in zip(found, of_padded, strict=True):
        end = 100 if one.shape[0] == 130 else 90
        assert one.equal(other[..., :36]) and one[:end].ne(0).any(-1).all() and one[end:].eq(0).all()
