"""A worker of a sweep that answers at once, without torch."""

import sys
from pathlib import Path

from reports.schema import Row

FAKE = """
import json, sys

task = json.loads(sys.stdin.readline())

def say(**event):
    print(json.dumps(event), flush=True)

if not task["cells"]:
    versions = dict(torch_version="2", triton_version="3", commit="abc", ceiling_tflops=CEILING, ceiling_gbs=2.0)
    where = dict(device=DEVICE, machine="Test (2 CPUs)", driver="none", threads=THREADS)
    say(event="environments", found=[dict(dtype=dtype, **where, **versions) for dtype in task["dtypes"][DEVICE]])
for cell in task["cells"]:
    say(event="start", id=cell["id"])
    if cell["provider"] in FAILING:
        say(event="outcome", id=cell["id"], status="error", reason="planted")
    else:
        latency = dict(latency_p20_ms=1.0, latency_p50_ms=2.0, latency_p80_ms=3.0, repeats=5)
        errors = dict(err_o=1e-7, err_o_t=1e-7, err_grad=None)
        host = dict(host_us=float(len(task["cells"])))
        say(event="outcome", id=cell["id"], status="ok", reason="", peak_mib=1.0, **latency, **errors, **host)
"""


def fake_worker(
    tmp_path: Path, threads: int = 2, failing: tuple[str, ...] = (), device: str = "cpu", ceiling: float = 1.0
) -> tuple[str, ...]:
    """A worker that answers at once, without torch; its host_us is the number of cells that share its process."""
    path = tmp_path / f"fake_{threads}_{len(failing)}_{device}_{ceiling}.py"
    constants = f"THREADS, FAILING, DEVICE, CEILING = {threads}, {failing!r}, {device!r}, {ceiling}\n"
    path.write_text(constants + FAKE)
    return (sys.executable, str(path))


def identity(row: Row) -> tuple[str, str, int, str]:
    return row.provider, row.mode, row.queries, row.status
