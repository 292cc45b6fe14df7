"""Windows and packed sequences on the warp-specialised kernels, in an emulator of the GPU and, on one, compiled."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import flashjvp
from flashjvp.backends.patterns import Band, Packed
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import replaced
from flashjvp.kernels.launch.call import Call
from flashjvp.kernels.launch.hopper_tables import MEASURED_BANDS, ONE_PASS_UNLESS_SUMMED, PIPELINES
from flashjvp.kernels.launch.schedule import padded_width
from flashjvp.operands import Inputs
from tests.flashjvp.kernels.test_hopper import PLAIN, expected, interpreted, pipelines_in_use
from verify.budget.tolerance import budget, check
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.emulated import tf32
from verify.emulator.compiled import compiling
from verify.emulator.gluon import emulated
from verify.oracles.attention import dense64, dense_same_type, run

Window = tuple[int | None, int | None]
CASES = (
    Case("gqa_64", batch=(2,), q_heads=2, kv_heads=1, m=300, n=420, d=64, dv=64),
    Case("plain_64", batch=(1,), q_heads=2, kv_heads=2, m=270, n=300, d=64, dv=64, **PLAIN),
    Case("few_72", batch=(1,), q_heads=2, kv_heads=2, m=60, n=300, d=72, dv=72),
    Case("long_72", batch=(1,), q_heads=2, kv_heads=1, m=400, n=270, d=72, dv=72),
    Case("square_96", batch=(1,), q_heads=2, kv_heads=2, m=256, n=256, d=96, dv=96),
    Case("ragged_128", batch=(1,), q_heads=2, kv_heads=1, m=300, n=260, d=128, dv=128),
    Case("values_narrower_128", batch=(1,), q_heads=2, kv_heads=1, m=200, n=260, d=128, dv=64),
    Case("plain_128", batch=(1,), q_heads=2, kv_heads=2, m=130, n=400, d=128, dv=128, **PLAIN),
    Case("causal_80", batch=(1,), q_heads=1, kv_heads=1, m=200, n=260, d=80, dv=80, is_causal=True),
    Case("low_scores_128", batch=(1,), q_heads=1, kv_heads=1, m=200, n=210, d=128, dv=128, kind="low_scores"),
    Case("one_row", batch=(), q_heads=2, kv_heads=2, m=1, n=1, d=64, dv=64),
)  # fmt: skip
WINDOWS: tuple[Window, ...] = ((0, 0), (30, 41), (128, 127), (None, 3), (70, None), (10_000, 10_000))


def visible(case: Case, window: Window) -> Tensor:
    left, right = window
    distance = torch.arange(case.n) - torch.arange(case.m)[:, None]
    aligned = distance - (case.n - case.m)
    keep = (aligned >= -left) if left is not None else torch.ones_like(aligned, dtype=torch.bool)
    keep = keep & (aligned <= right) if right is not None else keep
    return keep & (distance <= 0) if case.is_causal else keep


def families(inputs: Inputs, ordered: bool) -> set[str]:
    """In one pass nothing is added up to d_q."""
    columns = padded_width(max(inputs.q.shape[-1], inputs.v.shape[-1]))
    in_one_pass = expected(replace(inputs, is_causal=False), ordered=True)
    if "backward_one_pass" in in_one_pass and (ordered or columns not in ONE_PASS_UNLESS_SUMMED):
        return in_one_pass
    return expected(inputs, ordered, in_one_pass=False)


def judge(case: Case, window: Window, dtype: torch.dtype, ordered: bool, device: str = "cpu") -> None:
    inputs = make_inputs(case, dtype, device)
    explicit = replace(inputs, mask=visible(case, window).to(device), is_causal=False)
    exact = dense64(explicit)
    budgets = budget(explicit, exact, dense_same_type(explicit))
    with pipelines_in_use(ordered) as launched:
        results = run(inputs, "triton", window=window)
    assert set(launched) == {f"partial_{family}" for family in families(inputs, ordered)}
    assert not [row for row in check(results, exact, budgets) if not row.ok]


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_emulated(case: Case, window: Window, ordered: bool) -> None:
    with emulated():
        judge(case, window, torch.float16, ordered)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_compiled(case: Case, window: Window, ordered: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge(case, window, dtype, ordered, "cuda")


LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "short": ((1, 63, 0, 64, 65), (5, 130, 3, 0, 129)),
    "around a block": ((127, 128, 129, 130), (130, 129, 128, 127)),
    "none at first": ((0, 0, 70, 1), (0, 9, 200, 1)),
    "one": ((140,), (270,)),
    "many": ((3, 2, 1) * 50, (2, 3, 1) * 50),
}
FORMS: dict[str, dict[str, Any]] = {
    "64": {"d": 64},
    "72": {"d": 72},
    "96 for 56": {"d": 56, "dv": 96},
    "128": {"d": 128},
    "128, one key head": {"d": 128, "heads": 2},
    "64, one key head": {"d": 64, "heads": 3},
    "64, plain": {"d": 64, "tangents": False},
    "128, plain": {"d": 128, "tangents": False},
    "72, q_t alone": {"d": 72, "names": "q"},
}


class Sequences:
    """Inputs of packed sequences, and what a backend gives for them: outputs and gradients by name."""

    def __init__(
        self, of_q: Sequence[int], of_k: Sequence[int], d: int, dv: int | None = None, heads: int = 1,
        tangents: bool = True, names: str = "qkv", device: str = "cpu", dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(3)

        def rows(count: int, heads: int, width: int) -> Tensor:
            return torch.randn(count, heads, width, generator=generator).to(device, dtype)

        sizes = {"q": (sum(of_q), heads, d), "k": (sum(of_k), 1, d), "v": (sum(of_k), 1, dv or d)}
        self.x = {name: rows(*size) for name, size in sizes.items()}
        if tangents:
            self.x |= {f"{name}_t": rows(*sizes[name]) for name in names}
        self.cotangents = [rows(sum(of_q), heads, dv or d) for _ in range(1 + tangents)]
        self.cu = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (of_q, of_k)
        ]

    def results(self, backend: str, is_causal: bool) -> dict[str, Tensor]:
        x = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.x.items()}
        of = flashjvp.attention_varlen_jvp if len(x) > 3 else flashjvp.attention_varlen
        out: Any = of(**x, cu_q=self.cu[0], cu_k=self.cu[1], is_causal=is_causal, enable_gqa=True, backend=backend)
        outputs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outputs, list(x.values()), self.cotangents)
        return dict(zip(("o", "o_t"), outputs, strict=False)) | {
            f"d_{name}": grad for name, grad in zip(x, grads, strict=True)
        }

    def alone(self, b: int) -> "Sequences":
        """Sequence number b."""
        made = object.__new__(Sequences)
        rows = {side: slice(*cu[b : b + 2].tolist()) for side, cu in zip("qk", self.cu, strict=True)}
        made.x = {name: x[rows["q" if name[0] == "q" else "k"]] for name, x in self.x.items()}
        made.cotangents = [x[rows["q"]] for x in self.cotangents]
        made.cu = [torch.tensor([0, r.stop - r.start], dtype=torch.int32, device=x.device)
                   for r, x in zip(rows.values(), self.cu, strict=True)]  # fmt: skip
        return made


def side(name: str) -> str:
    return "q" if name in ("o", "o_t", "d_q", "d_q_t") else "k"


def judge_packed(form: dict[str, Any], lengths: str, is_causal: bool, **options: Any) -> None:
    """Within rounding of the numbers in float64, and of no sequence a bit is another one alone."""
    sequences = Sequences(*LENGTHS[lengths], **form, **options)
    with pipelines_in_use(False) as launched:
        found = sequences.results("triton", is_causal)
    assert launched and all(family.startswith("varlen_") for family in launched)
    assert "varlen_backward_dq_accum" not in launched
    exact = Sequences(*LENGTHS[lengths], **form)
    exact.x = {name: x.double().cpu() for name, x in sequences.x.items()}
    exact.cotangents = [x.double().cpu() for x in sequences.cotangents]
    for name, wanted in exact.results("tiled", is_causal).items():
        scale = wanted.square().mean().sqrt() + 1e-2
        error = (found[name].double().cpu() - wanted).abs().max() / scale
        assert error < 1e-2 * (8 if found[name].dtype == torch.bfloat16 else 1), (name, error)


@interpreted
@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_sequences_emulated(form: str, lengths: str, is_causal: bool) -> None:
    with emulated():
        judge_packed(FORMS[form], lengths, is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_sequences_compiled(form: str, lengths: str, is_causal: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    judge_packed(FORMS[form], lengths, is_causal, device="cuda", dtype=dtype)


@interpreted
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", [64, 72, 128])
def test_bits_of_a_sequence_are_those_of_it_alone(d: int, is_causal: bool) -> None:
    """Whatever is before and after it: here NaN."""
    sequences = Sequences((70, 131, 5), (40, 150, 130), d, heads=2)
    (q, *_), (k, *_) = pairwise(sequences.cu[0][1:3].tolist()), pairwise(sequences.cu[1][1:3].tolist())
    rows = {"q": slice(*q), "k": slice(*k)}
    alone = sequences.alone(1)
    of_side = [(x, rows["q" if name[0] == "q" else "k"]) for name, x in sequences.x.items()]
    for x, kept in [*of_side, *((x, rows["q"]) for x in sequences.cotangents)]:
        x[: kept.start], x[kept.stop :] = torch.nan, torch.nan
    with emulated(), pipelines_in_use(False) as launched:
        together, by_itself = sequences.results("triton", is_causal), alone.results("triton", is_causal)
    assert launched
    for name, x in by_itself.items():
        assert x.isfinite().all() and together[name][rows[side(name)]].equal(x)


@interpreted
def test_rows_of_no_sequence_are_zeros() -> None:
    """Nobody checks lengths that are on a GPU; emulated, the check of those on the host is left out."""
    sequences = Sequences((70, 60), (80, 50), 64)
    sequences.cu = [torch.tensor([0, 70, 100], dtype=torch.int32), torch.tensor([0, 80, 90], dtype=torch.int32)]
    with pytest.MonkeyPatch.context() as patched, emulated(), pipelines_in_use(False) as launched:
        patched.setattr(sys.modules["flashjvp.varlen"], "_is_readable", lambda lengths: False)
        found = sequences.results("triton", False)
    assert launched
    for name, x in found.items():
        end = 100 if side(name) == "q" else 90
        assert x[:end].isfinite().all() and x[:end].ne(0).any(-1).all() and x[end:].eq(0).all()


@interpreted
def test_what_other_kernels_serve() -> None:
    """A mask beside a window, dropout, and float32 in TF32; two batch entries of packed rows, as under vmap."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 1, rows, 64, generator=generator).half() for rows in (140, 150, 150) * 2]
    mask = torch.ones(140, 150, dtype=torch.bool)
    cu = [torch.tensor([0, rows], dtype=torch.int32) for rows in (140, 150)]
    q, k, v, *tangents = (x[0].transpose(0, 1) for x in inputs)
    with emulated(), pipelines_in_use(True) as launched:
        flashjvp.attention_jvp(*inputs, window=(20, 20), backend="triton")
        flashjvp.attention_varlen_jvp(q, k, v, *cu, None, None, *tangents, backend="triton")
        assert launched == ["partial_forward", "varlen_forward"]
        flashjvp.attention_jvp(*inputs, mask, window=(20, 20), backend="triton")
        flashjvp.attention_jvp(*inputs, dropout_p=0.5, window=(20, 20), backend="triton")
        with tf32():
            flashjvp.attention_jvp(*[x.float() for x in inputs], window=(20, 20), backend="triton")
            wide = [x.float() for x in (q, k, v)]
            flashjvp.attention_varlen_jvp(*wide, *cu, None, None, *[x.float() for x in tangents], backend="triton")
    assert launched == ["partial_forward", "varlen_forward"]


@pytest.mark.parametrize("pattern", [Band(-3, 3), Packed()], ids=["window", "packed"])
def test_served_where_they_were_measured(pattern: Any, machine: Callable[..., None]) -> None:
    """With the Tritons of the table, and where a test stands for such a Triton."""
    q, k = torch.empty(1, 1, 140, 64, device="meta").half(), torch.empty(1, 1, 150, 64, device="meta").half()
    cu = torch.empty(2, 4, dtype=torch.int32, device="meta")
    call = Call(q, k, k, cu if isinstance(pattern, Packed) else None, False, pattern=pattern)
    call.device = torch.device("cuda", 0)  # which no kernel is launched on
    assert eligibility.unwritten(call, Inputs(q, k, k), 0.125) is None
    for release in MEASURED_BANDS:
        machine(triton_release=release)
        assert eligibility.unmeasured(call) is None
    machine(triton_release=(99, 0))
    reason = eligibility.unmeasured(call)
    assert reason is not None and reason.endswith("with another Triton than 3.6, 3.7, 3.8, 3.9")
    with replaced.pipelines(PIPELINES["sm_90"]):
        assert eligibility.unmeasured(call) is None


@interpreted
def test_replayed_calls_of_sequences() -> None:
    """Of other tensors, whose descriptors begin before them."""
    sequences = Sequences((70, 60), (80, 50), 64)
    with emulated(), compiling() as replays, pipelines_in_use(True):
        results = [sequences.results("triton", False) for _ in range(4)]
        kept = [x.clone() for x in sequences.x.values()]  # elsewhere in memory
        sequences.x = dict(zip(sequences.x, kept, strict=True))
        results.append(sequences.results("triton", False))
    assert replays
    for name, x in results[0].items():
        assert x.ne(0).any() and all(other[name].equal(x) for other in results)
