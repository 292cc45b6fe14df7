"""`python -m verify codegen`: what the kernels compile to, what fails, and how the figures are read off the code."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from verify.codegen import command
from verify.codegen.command import SHARED_BYTES, compiled, fault
from verify.codegen.configuration import ADDITIVE, HEAD_DIMS, PARTIAL, Configuration, Kernel, sample
from verify.codegen.worker import in_loops, of_sass, overwritten

GOOD = Kernel("sm_90", "half", 64, 64, family="forward", tile="64x64x4x3", registers=210, tensor_core=24)
FAMILIES = ["forward", "backward_preprocess", "backward_query", "backward_key_value"]
SASS = """
 Function k:
  REG:40 STACK:16 SHARED:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x1 */
        /*0010*/                   STL [R1], R2 ;              /* 0x1 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ; /* 0x1 */
        /*0030*/                   LDL R3, [R1] ;              /* 0x1 */
        /*0040*/               @P0 BRA 0x20 ;                  /* 0x1 */
        /*0050*/                   EXIT ;                      /* 0x1 */
        /*0060*/                   BRA 0x60 ;                  /* 0x1 */
"""


@pytest.mark.parametrize(
    ("changes", "version", "reason"),
    [
        ({}, "3.6.0", ""),
        ({"failure": "CompilationError: x"}, "3.6.0", "CompilationError"),
        ({"shared_bytes": SHARED_BYTES["sm_90"]}, "3.6.0", ""),
        ({"shared_bytes": SHARED_BYTES["sm_90"] + 1}, "3.6.0", "shared memory"),
        ({"architecture": "sm_80", "shared_bytes": SHARED_BYTES["sm_80"] + 1}, "3.6.0", "shared memory"),
        ({"spill_bytes": 16}, "3.6.0", ""),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000}, "3.6.0", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "tangents": ""}, "3.6.0", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "mask": "bool", "causal": True}, "3.6.0", ""),
        ({"loop_spills": 9, "loop_spill_share": 1 / 100, "mask": "bool", "causal": True}, "3.6.0", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000}, "9.9", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000}, "3.9.1", ""),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "d": 72}, "3.9.1", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "kind": "tf32"}, "3.9.1", "spills"),
        ({"loop_spills": 9, "loop_spill_share": 1 / 200}, "3.9.1", "spills"),
        ({"loop_spills": 9, "loop_spill_share": 1 / 200, "family": "backward_key, warp-specialised"}, "3.9.1", ""),
        (
            {"loop_spills": 9, "loop_spill_share": 1 / 100, "family": "backward_key, warp-specialised"},
            "3.9.1",
            "spills",
        ),
        ({"loop_spill_share": 1 / 1000, "family": "forward, warp-specialised"}, "3.6.0", "spills"),
        ({"loop_spill_share": 1 / 1000, "ordered": True}, "3.6.0", "spills"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 33, "architecture": "sm_100"}, "3.6.0", ""),
        ({"loop_spills": 1, "loop_spill_share": 1 / 31, "architecture": "sm_89"}, "3.6.0", "spills"),
        ({"architecture": "sm_120", "shared_bytes": 101_377}, "3.6.0", "shared memory"),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "d": 36}, "3.6.0", ""),
        ({"loop_spills": 1, "loop_spill_share": 1 / 1000, "d": 36, "kind": "ieee"}, "3.6.0", "spills"),
    ],
)
def test_what_fails(changes: dict[str, object], version: str, reason: str) -> None:
    found = fault(replace(GOOD, **changes), version)  # type: ignore[arg-type]
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_trap_in_the_place_of_a_kernel_is_seen() -> None:
    assert "trap" in of_sass(SASS.replace("MOV R1, c[0x0][0x28]", "BPT.TRAP 0x1"))["failure"]


def test_sass_is_read() -> None:
    assert of_sass(SASS) == {
        "registers": 40, "spill_bytes": 16, "loop_spills": 1, "loop_spill_share": 1 / 3, "tensor_core": 1,
        "failure": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "is_wrong"),
    [
        (["HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR8], RZ", "FADD R9, R24, R25"], False),
        (["HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR8], RZ", "MUFU.EX2 R166, R24"], True),
        (["HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR8], RZ", "@P0 LDS.64 R163, [R2]"], True),
        (["F2FP.BF16.F32.PACK_AB R164, R3, R4", "HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR8], RZ"], False),
        (["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ", "MUFU.EX2 R24, R24"], False),
    ],
)
def test_a_register_operand_that_a_loop_overwrites_is_seen(body: list[str], is_wrong: bool) -> None:
    """As ptxas compiled a kernel whose results were wrong from the second turn of its loop on."""
    code = [("0x0", "LDSM.16.M88.4 R164, [R5]"), *((f"0x{n}0", line) for n, line in enumerate(body, 1))]
    code.append(("0x90", "@P0 BRA 0x10"))
    assert bool(overwritten(code)) == is_wrong


def test_only_innermost_loops_count() -> None:
    inner = [("a", "spill"), ("b", "x"), ("", "jump b"), ("", "jump a")]
    assert in_loops(inner, r"jump (\w)", "spill") == (0, 0.0)
    assert in_loops([("a", "spill"), ("", "x"), ("", "jump a")], r"jump (\w)", "spill") == (1, 1 / 3)


def test_the_sample_has_every_head_dim_kind_and_option() -> None:
    chosen = sample("sm_90")
    assert len(set(chosen)) == len(chosen)
    assert {(c.kind, c.d) for c in chosen} >= {("half", d) for d in HEAD_DIMS} | {("tf32", 64), ("ieee", 256)}
    assert {c.tangents for c in chosen} >= {"", "q", "k", "v", "qkv"}
    assert {c.mask for c in chosen} == {"", "bool", *ADDITIVE, "learned", "dropout", *PARTIAL}
    assert any(c.causal and c.mask for c in chosen) and any(c.group > 1 for c in chosen)
    assert any(c.d != c.dv for c in chosen)


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
def test_kernels_compile_without_a_gpu_and_after_a_compiler_that_dies(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PROCESSES", 1)
    jobs = [Configuration("no such", "half", 16, 16), Configuration(architecture, "half", 16, 16, group=2)]
    dead, kernels = compiled(jobs)
    assert [kernel.architecture for kernel in dead] == ["no such"]
    assert "exit code 1: error: 'no such' is not in list" in fault(dead[0], "9.9")
    assert [kernel.family for kernel in kernels] == FAMILIES
    for kernel in kernels:
        assert fault(kernel, "9.9") == ""
        assert architecture in kernel.isa and kernel.registers > 0
        assert (kernel.tensor_core > 0) == (kernel.shared_bytes > 1024) == (kernel.family != "backward_preprocess")
        assert kernel.architecture == architecture and kernel.group == 2


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the table is in the CSV, and the exit code says whether one failed."""
    found = []

    def compiled_once(plan: list[Configuration]) -> Generator[list[Kernel]]:
        found.extend([] if found else compiled(plan))
        yield from found

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(command, "compiled", compiled_once)
    plan = [Configuration("sm_90", "half", 16, 16, tangents="")]
    monkeypatch.setattr(command, "sample", lambda architecture: plan)
    for limit, code, said in ((SHARED_BYTES["sm_90"], 0, "0 failed"), (1000, 1, "shared memory")):
        monkeypatch.setitem(SHARED_BYTES, "sm_90", limit)
        assert command.main(["--arch", "sm_90", "--out", str(tmp_path)]) == code
        assert said in capsys.readouterr().out
        rows = pd.read_csv(tmp_path / "codegen.csv")
        assert list(rows.family) == FAMILIES
