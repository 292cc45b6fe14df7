"""precision="high" on the warp-specialised kernels, in the emulator and, on a GPU, compiled."""

import pytest
import torch

from tests.flashjvp.kernels.test_hopper import CASES, NOT_SERVED
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import high
from verify.checks.high import more_precise
from verify.oracles.attention import Subject

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator serves machines without a GPU")
ONE = {"batch": (1,), "q_heads": 1, "kv_heads": 1, "m": 130, "n": 150, "d": 64, "dv": 64}
# Where a large S_t would take the digits of v_t and d_o.
LARGE = (
    Case("scores_300", **ONE, magnitude=300.0),
    Case("scores_1000", **ONE, magnitude=1000.0),
    Case("large_mu_and_scores", **ONE, kind="large_mu", magnitude=30.0),
    Case("small_scores", **ONE, magnitude=0.01),
)  # fmt: skip


@ON_CPU
@pytest.mark.sampled(of=24)
@pytest.mark.parametrize(
    "case", [*(case for case in CASES if not (case.mask or "").startswith("additive")), *LARGE], ids=str
)
def test_emulated(case: Case) -> None:
    assert [x for x in high(make_inputs(case, torch.float16), Subject("triton")) if not x.ok] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *LARGE, *NOT_SERVED], ids=str)
def test_compiled(case: Case, dtype: torch.dtype) -> None:
    assert [x for x in more_precise(make_inputs(case, dtype, "cuda"), Subject("triton")) if not x.ok] == []
