"""Calls on copies (backends/copies.py): which are not, and what is around them: replay, transforms, autograd."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import flashjvp
from flashjvp.dispatch import fast_path
from flashjvp.kernels.launch import replaced
from tests.flashjvp.kernels.test_copies import ONE, assert_same_bits, copies_seen
from tests.flashjvp.kernels.test_hopper import PIPELINES, interpreted
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import high
from verify.emulator.compiled import compiling
from verify.emulator.gluon import emulated
from verify.oracles.attention import NAMES, Subject, dense64, dense_same_type, run

VARLEN = sys.modules["flashjvp.varlen"]  # whose name in the package may be a function's
# Which no such kernels would serve if they were padded.
OTHERS = (
    Case("two_batch_dims", batch=(1, 2), m=33, n=40, d=36, dv=36),
    Case("negative_scale", **ONE, d=36, dv=36, scale=-0.3),
    Case("v_t_alone", **ONE, d=36, dv=36, tangents=("v",)),
    Case("wide_without_tangents", **ONE, d=130, dv=130, tangents=(), cotangents=("o",)),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_nothing_is_copied_for_calls_that_such_kernels_do_not_serve(case: Case) -> None:
    with emulated(), copies_seen() as seen:
        run(make_inputs(case, torch.float16), "triton")
    assert not seen


@interpreted
def test_only_what_does_not_fit_is_copied() -> None:
    """Neither tensors of the other head dim, nor those beside a broadcast one, nor tangents that no product has."""
    values = make_inputs(Case("values", **ONE, d=64, dv=62), torch.float16)
    one = make_inputs(Case("one", **ONE | {"kv_heads": 2, "q_heads": 2}, d=64, dv=64), torch.float16)
    one = replace(one, k=one.k[:, :1].expand_as(one.k))
    o_alone = make_inputs(Case("o_alone", **ONE, d=36, dv=36, cotangents=("o",)), torch.float16)
    with emulated(), copies_seen() as seen:
        run(values, "triton")
        assert seen == [64, 64, 62, 62, *[64] * 6, 62, 62]  # forward v and o, backward v, d_o, o and d_v, and tangents
        seen.clear()
        run(one, "triton")
        assert seen == [64, 64]
        seen.clear()
        run(o_alone, "triton")
        assert seen == [*[40] * 6, 36, 36, *[40] * 5, *[36] * 3]


@interpreted
@pytest.mark.parametrize("form", ["odd", "apart", "narrow", "packed"])
def test_replayed_calls_copy_the_tensors_that_they_are_given(form: str) -> None:
    d, generator = {"odd": 36, "apart": 64, "narrow": 9, "packed": 44}[form], torch.Generator().manual_seed(5)
    cu = torch.tensor([0, 13, 40], dtype=torch.int32)

    def call(x: list[Tensor]) -> list[Tensor]:
        leaves = [y.requires_grad_() for y in x]
        if form == "packed":
            outputs = flashjvp.attention_varlen_jvp(*leaves[:3], cu, cu, None, None, *leaves[3:], backend="triton")
        else:
            outputs = flashjvp.attention_jvp(*leaves, backend="triton")
        grads = torch.autograd.grad(outputs, leaves, [y.detach().sin() for y in outputs])
        return [y.detach() for y in (*outputs, *grads)]

    def drawn() -> list[Tensor]:
        shape = (40, 1, d) if form == "packed" else (1, 2, 40, d + 4 * (form == "apart"))
        return [torch.randn(shape, generator=generator).half()[..., :d] for _ in range(6)]

    given = [drawn() for _ in range(6)]
    fast_path.forget()
    with emulated(), replaced.pipelines(PIPELINES, dq_accum_from={}), pytest.MonkeyPatch.context() as patched:
        patched.setattr(VARLEN, "_is_readable", lambda lengths: False)
        first = [y for x in given for y in call(x)]
        with compiling() as replays:
            again = [y for x in given for y in call(x)]
    fast_path.forget()
    assert len(replays) == 8  # of two calls nothing is known
    assert all(map(torch.equal, first, again))


@interpreted
def test_an_address_that_16_bytes_do_not_divide() -> None:
    inputs = make_inputs(Case("address", **ONE, d=64, dv=64), torch.float16)
    moved = inputs.map(lambda x: torch.cat([x.new_zeros(4), x.flatten()])[4:].view(x.shape))
    with emulated(), copies_seen() as seen:
        found, again = run(inputs, "triton"), run(inputs, "triton")
        assert not seen
        for _ in range(3):  # calls like earlier ones, which are replayed
            assert_same_bits(run(moved, "triton"), found)
        assert seen
    assert_same_bits(found, again)


@interpreted
@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize(("d", "dv"), [(36, 36), (64, 64), (100, 64)])
def test_a_plain_sum_has_broadcast_cotangents(d: int, dv: int, layout: Any) -> None:
    """And results lie in memory as on every backend."""
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(2, 9, 9, width, generator=generator).half() for width in (d, d, dv, d, d, dv)]

    def results(backend: str, contiguous: bool) -> list[Tensor]:
        leaves = [y.clone().requires_grad_() for y in x]
        outputs: Any = flashjvp.attention_jvp(*leaves, layout=layout, backend=backend)
        if contiguous:
            return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]
        return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), leaves)]

    with emulated(), copies_seen() as seen:
        found = results("triton", contiguous=False)
        assert seen
        of_contiguous, plain = results("triton", contiguous=True), results("tiled", contiguous=False)
    for one, other, of_tiled in zip(found, of_contiguous, plain, strict=True):
        assert one.equal(other) and one.shape == of_tiled.shape and one.stride() == of_tiled.stride()


@interpreted
def test_transforms() -> None:
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(2, 2, 20, 36, generator=generator).half() for _ in range(6)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashjvp.attention(q, k, v, backend="triton")

    with emulated(), copies_seen() as seen:
        whole, of_jvp = flashjvp.attention_jvp(*x, backend="triton"), jvp(attention, tuple(x[:3]), tuple(x[3:]))
        assert len(seen) == 16 and all(map(torch.equal, whole, of_jvp))
        assert vmap(attention)(*x[:3]).equal(attention(*x[:3]))
        assert len(seen) == 24


@interpreted
@pytest.mark.parametrize(
    "shapes", [(0, 3, 36, 36), (3, 0, 36, 36), (3, 3, 0, 36), (3, 3, 36, 0), (3, 3, 1, 0), (0, 0, 1, 1)], ids=str
)
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_compute(shapes: tuple[int, ...], batch: int) -> None:
    m, n, d, dv = shapes
    case = Case("empty", batch=(batch,), q_heads=2, kv_heads=1, m=m, n=n, d=d, dv=dv, scale=0.5)
    inputs = make_inputs(case, torch.float16)
    with emulated(), copies_seen():
        found = run(inputs, "triton")
    if dv == 0:  # of which there is no noise to make a budget of
        assert all(getattr(found, name).shape == getattr(inputs, name[2:]).shape for name in NAMES[2:])
        assert found.o.shape[-1] == 0 and not any(getattr(found, name).any() for name in NAMES)
        return
    exact = dense64(inputs)
    assert not [row for row in check(found, exact, budget(inputs, exact, dense_same_type(inputs))) if not row.ok]


@interpreted
def test_autograd_saves_no_copy() -> None:
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    x = [torch.randn(1, 1, 20, 36).half().requires_grad_() for _ in range(6)]
    with emulated(), copies_seen() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        outputs = flashjvp.attention_jvp(*x, backend="triton")
    assert seen and saved and {y.shape[-1] for y in saved if y.ndim == 4} == {36}
    assert all(y.untyped_storage().nbytes() == y.nbytes for y in (*outputs, *saved))


@interpreted
def test_precision_high() -> None:
    inputs = make_inputs(Case("high", **ONE, d=36, dv=52), torch.float16)
    assert [x for x in high(inputs, Subject("triton")) if not x.ok] == []
