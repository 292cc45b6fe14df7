"""What rounding partial results costs a sequence on several processes is what blocks.py says: no less and no more."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from verify.budget.blocks import Block, gradients, outputs
from verify.budget.propagation import StreamingKernel
from verify.budget.rounding import rounding_bounds
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.distributed import Divided, Layout, blocks
from verify.oracles.attention import dense64

CASE = Case("parts", batch=(), q_heads=6, kv_heads=2, m=48, n=60, d=16, dv=24)
DIVIDED = (
    Layout(ring=2), Layout(ring=3), Layout(ring=4), Layout(ring=2, zigzag=True), Layout(ulysses=4),
    Layout(ring=3, ulysses=4, zigzag=True),
)  # fmt: skip
AS_STORED = ("o", "o_t", "d_v", "d_v_t")
"""Results in which nothing else is rounded, on a backend that computes half types in float32. The others also have the
errors of a and delta, which come from o and o_t as stored."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", DIVIDED, ids=str)
def test_the_variance_is_that_of_the_errors(layout: Layout, is_causal: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(replace(CASE, is_causal=is_causal), dtype)
    exact, found, kernel = dense64(inputs), Divided("tiled", layout).results(inputs), StreamingKernel(inputs)
    calls = blocks(layout, inputs)
    of_o, of_o_t = outputs(kernel, calls)
    for name, variance in {"o": of_o, "o_t": of_o_t, **gradients(kernel, calls)}.items():
        value = getattr(exact, name)
        error = (getattr(found, name).double() - value).square().sum()
        ratio = (error / (variance + kernel.type.stored(value)).sum()).item()
        assert 0.75 < ratio < (1.25 if name in AS_STORED else 1.8), (name, ratio)


def test_a_sum_of_blocks_that_is_sent_is_rounded_once_more() -> None:
    kernel, heads, keys = StreamingKernel(make_inputs(CASE, torch.float16)), range(6), range(60)

    def of_d_v_t(owner: int) -> Tensor:
        two = [Block(heads, rows, keys, ulysses=0, rank=0, owner=owner) for rows in (range(16), range(16, 32))]
        other = Block(heads, range(32, 48), keys, ulysses=0, rank=1, owner=owner)
        return gradients(kernel, [*two, other])["d_v_t"]

    P, T = (kernel.fold(x[..., :32, :]) for x in (kernel.P, kernel.T))
    more = of_d_v_t(owner=1) - of_d_v_t(owner=0)
    torch.testing.assert_close(more / kernel.type.stored(P.mT @ T), torch.ones_like(more))


def test_one_process_rounds_no_more_than_a_kernel() -> None:
    inputs = make_inputs(CASE, torch.float16)
    one, kernel = (rounding_bounds(inputs, calls) for calls in (blocks(Layout(), inputs), ()))
    assert {name: x.whole for name, x in one.items()} == {name: x.whole for name, x in kernel.items()}
