"""The fused kernels compile for GPUs at widths of networks, without spills and in the shared memory that there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import json, sys, torch
from dataclasses import asdict
from tvm_ref.model.fused import heads_operators, stream_operators
from verify.codegen.configuration import Configuration
from verify.codegen.worker import META, compile_all

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)

def run(operators, forward, backward):
    for given, results, fill in (
        (operators.Forward(*forward), operators._forward_results, operators._forward),
        (operators.Backward(*backward), operators._backward_results, operators._backward),
    ):
        fill(given, results(given))

def launch(configuration):
    channels, dims = map(int, sys.argv[2:])
    x, half = empty(64, 256, channels), empty(64, 256, channels, dtype=torch.bfloat16)
    vector = empty(64, 6, 1, channels)[:, 0]
    for gated, normed in ((True, True), (False, True), (True, False)):
        row, branch, inner = (x if normed else None), (half if gated else None), (half if normed else None)
        gate, scale = (vector if gated else None), (vector if normed else None)
        run(
            stream_operators,
            (x, x, branch, branch, gate, gate, scale, scale, scale, scale, 1e-6, torch.bfloat16),
            (row, row, branch, branch, gate, gate, scale, scale, x, x, inner, inner, 1e-6),
        )
    qkv, weight = empty(64, 256, 3 * 18 * dims, dtype=torch.bfloat16), empty(dims)
    part = empty(64, 256, 18, dims, dtype=torch.bfloat16)
    packed = (qkv, qkv, weight, weight)
    run(heads_operators, (*packed, 18, 1e-6), (*packed, *[part] * 6, 18, 1e-6))

print(json.dumps([asdict(kernel) for kernel in compile_all(Configuration(sys.argv[1], "half", 64, 64), launch)]))
"""


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize(
    ("architecture", "shared_bytes", "channels", "dims"), [("sm_90", 232_448, 1152, 64), ("sm_86", 101_376, 2048, 72)]
)
def test_they_compile_for_the_gpu(
    architecture: str, shared_bytes: int, channels: int, dims: int, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = [sys.executable, "-c", COMPILE, architecture, str(channels), str(dims)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == 8
    for kernel in kernels:
        assert not kernel["failure"] and not kernel["loop_spills"] and kernel["shared_bytes"] <= shared_bytes, kernel
