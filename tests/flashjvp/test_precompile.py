"""`flashjvp.precompile`: what it compiles is what calls then look for, and kernels of a call compile side by side."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, UnsupportedError, environment
from flashjvp.kernels.launch import compilation, replay
from flashjvp.kernels.launch.call import Call
from tests.flashjvp.kernels.stand_in import Compiled

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {"head_dim": 64, "dtype": torch.float16}


class Kernel(triton.JITFunction):  # type: ignore[misc, type-arg]
    """Stands for a jitted kernel whose compilation takes until `together` of them are being compiled."""

    def __init__(self, barrier: threading.Barrier | None = None, fails: bool = False) -> None:
        self.fn = object()
        self.arg_names = ["q", "scale", "batch_shape", "M", "N", "heads", "group", "K_COLUMNS"]
        self.barrier, self.fails, self.compilations = barrier, fails, 0
        self.launches: list[Any] = []

    def _compiled(self) -> Any:
        self.compilations += 1
        if self.barrier is not None:
            self.barrier.wait(60)
        if self.fails:
            raise ValueError("no such instruction")
        return Compiled(self)  # type: ignore[arg-type]

    def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
        mode = triton.runtime._async_compile.active_mode.get()
        if mode is None:
            return self._compiled()
        nothing = [lambda kernel: None] * (1 + (triton.__version__ >= "3.9"))
        return mode.submit(id(self), self._compiled, *nothing)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    environment.forget()
    yield
    environment.forget()


def call_of(kernels: list[Kernel]) -> Callable[..., str]:
    """A function that launches kernels, as those of a backend do."""
    x = torch.empty(1, 2, 32, 64)

    def launched(word: str) -> str:
        for kernel in kernels:
            call = Call(x, x, x, None, False)
            call.launch(kernel, "forward", 1, call.operands(x), 1.0)
        return word

    return replay.side_by_side(launched)


def test_the_kernels_of_a_call_are_compiled_at_the_same_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier of three: one after the other, the first would wait in vain."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    barrier = threading.Barrier(3)
    kernels = [Kernel(barrier) for _ in range(3)]
    function = call_of(kernels)
    assert [function(word) for word in ("a", "b")] == ["a", "b"]
    assert [kernel.compilations for kernel in kernels] == [1, 1, 1]
    assert [len(kernel.launches) for kernel in kernels] == [2, 2, 2]


def test_what_the_compiler_raises_comes_out_of_the_call_and_the_next_one_tries_again() -> None:
    good, bad = Kernel(), Kernel(fails=True)
    function = call_of([good, bad])
    for count in (1, 2):
        with pytest.raises(ValueError, match="no such instruction"):
            function("a")
        assert (good.compilations, bad.compilations) == (1, count)
    bad.fails = False
    assert function("a") == "a"


def test_a_call_inside_a_call_compiles_with_it() -> None:
    kernels = [Kernel(), Kernel()]
    inner, other = (call_of([kernel]) for kernel in kernels)
    assert replay.side_by_side(lambda: inner("a") + other("b"))() == "ab"
    assert [(kernel.compilations, len(kernel.launches)) for kernel in kernels] == [(1, 1), (1, 1)]


def test_nothing_is_launched_where_kernels_are_asked_for() -> None:
    kernel = Kernel()
    function = call_of([kernel])
    (wanted,) = compilation.kernels_of(function, "a")
    assert wanted.kernel is kernel and not kernel.launches and compilation.THREAD.collected is None
    compilation.compile_all([wanted])
    assert not compilation.kernels_of(function, "a")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"head_dim": 0}, ArgumentValueError, "head_dim: expected 1 to 256, got 0"),
        ({"head_dim": 257}, ArgumentValueError, "head_dim: expected 1 to 256, got 257"),
        ({"head_dim": 64.0}, ArgumentTypeError, "head_dim: expected an int, got float"),
        ({"value_dim": True}, ArgumentTypeError, "value_dim: expected an int, got bool"),
        ({"tokens": 0}, ArgumentValueError, "tokens: expected 1 to"),
        ({"dtype": "bf16"}, ArgumentTypeError, "dtype: expected a torch.dtype, got str"),
        ({"dtype": torch.int32}, ArgumentTypeError, "dtype: expected float16, bfloat16 or float32, got torch.int32"),
        ({"dtype": torch.float64}, ArgumentTypeError, "dtype: expected float16, bfloat16 or float32"),
        ({"tangents": ("q",)}, ArgumentTypeError, "tangents: expected a str, got tuple"),
        ({"tangents": "qx"}, ArgumentValueError, "tangents: expected letters of 'qkv', got 'qx'"),
        ({"attn_mask": "causal"}, ArgumentValueError, "attn_mask: expected None, 'bool', 'additive' or 'blocks', got"),
        ({"attn_mask": True}, ArgumentValueError, "attn_mask: expected None"),
        ({"is_causal": 1}, ArgumentTypeError, "is_causal: expected a bool, got int"),
        ({"window": (3, 2)}, ArgumentTypeError, "window: expected a bool, got tuple"),
        (
            {"packed": True, "dropout": True},
            ArgumentValueError,
            "packed: expected no mask, window or dropout beside it",
        ),
        ({"packed": True, "attn_mask": "blocks"}, ArgumentValueError, "packed: expected no mask"),
        ({"packed": True, "window": True}, ArgumentValueError, "packed: expected no mask"),
        ({"precision": "low"}, ArgumentValueError, "precision: expected None or 'high', got 'low'"),
        ({"precision": "high", "window": True}, ArgumentValueError, "precision: expected None beside window, packed"),
        ({"backward": None}, ArgumentTypeError, "backward: expected a bool, got NoneType"),
        ({"device": "no such"}, ArgumentValueError, "device: expected a CUDA device, got 'no such'"),
        ({"device": "cpu"}, ArgumentValueError, "device: expected a CUDA device, got 'cpu'"),
        ({"device": "cuda:99"}, ArgumentValueError, "device: expected a CUDA device of this machine, got 'cuda:99'"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"^{said}"):
        flashjvp.precompile(**GOOD | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_raises() -> None:
    with pytest.raises(ArgumentValueError, match=r"^device: expected a CUDA device of this machine, got 'cuda'"):
        flashjvp.precompile(64, torch.float16)


def test_without_kernels_for_a_card_it_raises(machine: Callable[..., None]) -> None:
    machine(capability=(7, 5), is_amd=False)
    with pytest.raises(UnsupportedError, match=r"expected compute capability 8\.0"):
        flashjvp.precompile(64, torch.float16, device="cuda:0")


@pytest.mark.parametrize("sizes", [{"head_dim": 136}, {"head_dim": 64, "value_dim": 256}], ids=str)
def test_head_dims_too_wide_for_a_card_with_little_memory_raise(
    machine: Callable[..., None], sizes: dict[str, int]
) -> None:
    machine(capability=(8, 9), is_amd=False)
    with pytest.raises(UnsupportedError, match=r"expected head dims of at most 256 \(128 for float32"):
        flashjvp.precompile(dtype=torch.float32, device="cuda:0", **sizes)


PROGRAM = """
import sys, torch
from triton.runtime import driver
from verify.codegen.worker import META, Driver
import flashjvp
from flashjvp.backends import triton as kernels, triton_varlen
from flashjvp.backends.patterns import Band, Listed
from flashjvp.kernels.launch import compilation, schedule
driver.set_active(Driver("sm_86"))
schedule.ARCHITECTURES[META] = "sm_86"
print(*(flashjvp.precompile(16, torch.bfloat16, tangents=x, device="meta") for x in ("qkv", "qkv", "")))
x = torch.empty(3, 8, 100, 16, dtype=torch.bfloat16, device=META)  # other sizes, and rows of another layout
y = torch.empty(3, 100, 8, 16, dtype=torch.bfloat16, device=META).transpose(1, 2)
options = (None, None, None, False, 0.25, 0.0)
print(len(compilation.kernels_of(kernels.forward_jvp, x, y, x, y, x, y, *options)))
print(len(compilation.kernels_of(kernels.forward_jvp, x, y, x, y, None, y, *options)))
print(flashjvp.precompile(16, torch.bfloat16, attn_mask="additive", dropout=True, device="meta"))
x, y = x[:, :, :96], y[:, :, :96]
mask = torch.empty(1, 1, 96, 96, dtype=torch.bfloat16, device=META)
seed = torch.empty((), dtype=torch.int64, device=META)
for rate in (0.1, 1.0):
    options = (mask, None, seed, False, 0.25, rate)
    print(len(compilation.kernels_of(kernels.forward_jvp, x, y, x, y, x, y, *options)))
"""

PROGRAM_OF_OTHERS = (
    PROGRAM[: PROGRAM.index("print")]
    + """
for options in {"window": True}, {"attn_mask": "blocks"}, {"packed": True}:
    print(*(flashjvp.precompile(16, torch.bfloat16, is_causal=x, device="meta", **options) for x in (False, True)))
x = torch.empty(3, 8, 100, 16, dtype=torch.bfloat16, device=META)
y = torch.empty(3, 100, 8, 16, dtype=torch.bfloat16, device=META).transpose(1, 2)
plan, cu = (torch.empty(shape, dtype=torch.int32, device=META) for shape in ((1000,), (2, 5)))
options = (None, None, False, 0.25, 0.0)
for args in (None, *options, Band(-100, 7)), (None, *options, Band(0, 1)), (plan, *options, Listed()):
    print(len(compilation.kernels_of(kernels.forward_jvp, x, y, x, y, x, y, *args)))
a, b = x.transpose(1, 2), y.transpose(1, 2)  # rows before heads
print(len(compilation.kernels_of(triton_varlen.forward_jvp, a, b, a, b, a, b, cu, *options)))
x = x[:, :, :1].expand(3, 8, 1 << 31, 16)
(wanted,) = compilation.kernels_of(kernels.forward, x, x, x, None, None, False, 0.25, 0.0, Band(-1, 0))
print(*(wanted.args[wanted.kernel.arg_names.index(name)] >> 31 for name in ("low", "high", "M", "N")))
"""
)


# The last three: with dropout, for which one kernel is there; then other rates.
MASKED = ["4", "0", "4", "0", "1", "3", "0", "0"]
# Of windows, block masks and packed sequences: without and with is_causal, in which only the last ones differ; there
# the kernel of row sums is there already. The last four: bounds of a window are as wide as the sizes.
OTHERS = ["4", "0", "3", "0", "3", "3", "0", "0", "0", "0", "1", "1", "1", "1"]


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize(("program", "counts"), [(PROGRAM, MASKED), (PROGRAM_OF_OTHERS, OTHERS)])
def test_a_call_finds_what_was_compiled_for_its_like(program: str, counts: list[str], tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == counts


# Sizes, batch dims, layouts, the rate of dropout and the scale differ; so does where a mask is broadcast. Portable
# kernels have a code for masks whose rows they read in pieces of 16, and one for others; the warp-specialised ones have
# one for each of whether a mask differs between heads and between batch entries.
MOST_COMPILATIONS = {"none": 1, "grouped": 1, "dropout": 1, "bool": 2, "additive": 2, "learned": 2}
# Which have kernels of their own, where the portable ones are, and the warp-specialised ones.
OTHERS_AT = {"window": "partial", "blocks": "partial", "packed": "varlen"}
OF_BAND = {"hopper.backward_preprocess", "hopper.band_forward", "hopper.band_backward"}
SPECIALISED_AT = {
    "window": OF_BAND,
    "blocks": {"hopper.backward_preprocess", "hopper.block_mask_forward", "hopper.block_mask_backward"},
    "packed": OF_BAND,
}


@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("kind", [*MOST_COMPILATIONS, *OTHERS_AT])
@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_of_random_calls_each_kernel_is_compiled_once(architecture: str, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.flashjvp.kernels.random_calls", architecture, kind, "0"], cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    files = {name.rpartition(".")[0] for name in found}
    on_copies = {"portable.copy_rows"}  # of broadcast tensors
    if kind in OTHERS_AT:
        portable = {"portable.backward_preprocess", f"portable.{OTHERS_AT[kind]}"}
        served = SPECIALISED_AT[kind] | (portable if kind == "packed" else on_copies)  # several batch entries
        assert files == (served if architecture == "sm_90" else portable)
        assert all(count == 1 for name, count in found.items())
        return
    families = ("forward", "backward_preprocess", "backward_query", "backward_key")
    portable = {f"portable.{name}" for name in families}
    of_hopper = {"hopper.forward"} if kind in ("bool", "additive") else {"hopper.persistent_kernels"}
    is_served = architecture == "sm_90" and kind in ("none", "grouped", "bool", "additive")
    assert files & (portable | on_copies) == (on_copies if is_served else portable)
    assert files & {"hopper.forward", "hopper.persistent_kernels"} == (of_hopper if is_served else set())
    for name, count in found.items():
        most = 1 if name.endswith("preprocess_kernel") else MOST_COMPILATIONS[kind]
        assert count <= (4 if kind == "bool" and name.startswith("hopper") else most), found
