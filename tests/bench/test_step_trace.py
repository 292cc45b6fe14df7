"""The groups of a traced step: of a made-up trace of a GPU, whose every number is known, and of a recorded CPU."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import flashjvp
from bench.step_trace import BACKWARD, GROUPS, OPTIMIZER, STEP, Group, group_of, groups, work_of
from reports.step_profile import PROFILE_COLUMNS, STEP_OF, draw_profile, profile_table
from reports.training_tables import STEP_COLUMNS

BF16, FLOAT = "c10::BFloat16", "float"


class Trace:
    """A trace of one step of 1000 us; the host runs 0.01 us ahead of the GPU for each operator."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.identity = 0
        self.host("user_annotation", STEP, 0, 1000)

    def host(self, cat: str, name: str, start: float, duration: float, tid: int = 1, **args: Any) -> int:
        self.identity += 1
        args["External id"] = self.identity
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": tid, "args": args}
        )
        return self.identity

    def kernel(self, name: str, start: float, duration: float, by: int, cat: str = "kernel") -> None:
        args = {"External id": by}
        self.events.append({"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": 7, "args": args})

    def groups(self) -> dict[str, Group]:
        found = groups({"traceEvents": self.events})
        assert tuple(group.group for group in found) == GROUPS
        return {group.group: group for group in found}


def recorded() -> Trace:
    """Kernels of every group: two launched by one operator, one beside another, one outside of the step."""
    trace = Trace()
    shapes = {"Input Dims": [[16, 8], [8, 4]], "Input type": [BF16, BF16]}
    product = trace.host("cpu_op", "aten::mm", 10, 2, **shapes)
    trace.kernel("nvjet_tst_128x256_64x4", 100, 50, product)
    trace.kernel("cublasLt::splitKreduce_kernel", 150, 10, product)
    heads = {"Input Dims": [[2, 3, 64, 32], [2, 3, 64, 32], [2, 3, 64, 32]], "Input type": [BF16] * 3}
    attention = trace.host("cpu_op", "flashjvp::forward", 20, 2, **heads)
    trace.kernel("forward_kernel", 160, 40, attention)
    shapes = {"Input Dims": [[1024], [1024], []], "Input type": [FLOAT, FLOAT, "Scalar"]}
    trace.kernel("triton_poi_fused_0", 200, 20, trace.host("cpu_op", "triton_poi_fused_0", 30, 1, **shapes))
    trace.host("cpu_op", f"{BACKWARD}: CompiledFunctionBackward", 300, 50, tid=2)
    trace.kernel("triton_red_1", 310, 30, trace.host("cpu_op", "triton_red_1", 305, 1, tid=2, **shapes))
    reduce = trace.host("user_annotation", "nccl:all_reduce", 320, 5, tid=2)
    trace.kernel("ncclDevKernel_AllReduce_Sum_f32", 330, 40, reduce)  # 10 us beside the reduction, 30 us alone
    trace.host("user_annotation", OPTIMIZER, 400, 20)
    lists = {"Input Dims": [[[512], [512]], [[512], [512]]], "Input type": ["TensorList", "TensorList"]}
    trace.kernel("multi_tensor_apply", 410, 30, trace.host("cpu_op", "aten::_fused_adamw_", 401, 5, **lists))
    trace.kernel("copy", 440, 5, trace.host("cpu_op", "aten::copy_", 408, 1), cat="gpu_memcpy")
    trace.kernel("forward_kernel", 2000, 40, attention)
    return trace


def test_every_microsecond_of_a_gpu_is_in_one_group() -> None:
    found = recorded().groups()
    us = {name: round(1e3 * group.ms, 6) for name, group in found.items()}
    assert us == {
        "products": 60, "attention": 40, "elementwise forward": 20, "elementwise backward": 30, "optimizer": 35,
        "communication": 30, "idle": 785,
    }  # fmt: skip
    assert sum(us.values()) == 1000
    assert 1e3 * found["communication"].busy_ms == pytest.approx(40)
    assert [found[name].kernels for name in GROUPS] == [2, 1, 1, 1, 2, 1, 0]


def test_bytes_and_products_are_those_of_the_operands() -> None:
    found = recorded().groups()
    moved = {name: group.gib * 2**30 for name, group in found.items()}
    assert moved["products"] == 2 * (16 * 8 + 8 * 4 + 16 * 4)  # counted once, though two kernels ran
    assert moved["attention"] == 4 * 2 * (2 * 3 * 64 * 32)
    assert moved["elementwise forward"] == moved["elementwise backward"] == 2 * 4 * 1024
    assert moved["optimizer"] == 4 * (2 * 1024 + 1024)
    assert found["products"].tflop == pytest.approx(2 * 16 * 8 * 4 / 1e12)
    assert found["attention"].tflop == pytest.approx(4 * 2 * 3 * 64 * 64 * 32 / 1e12)


def test_several_steps_are_averaged() -> None:
    trace = recorded()
    trace.host("user_annotation", STEP, 1900, 1000)
    assert trace.groups()["attention"].ms == pytest.approx(0.04)
    assert trace.groups()["products"].ms == pytest.approx(0.03)


def test_a_floor_is_the_longer_of_bytes_and_products() -> None:
    group = Group("products", 1.0, 1.0, gib=1.0, tflop=2.0, kernels=1)
    assert group.floor_ms(1.0, 1000.0) == 2.0
    assert group.floor_ms(0.1, 1000.0) == pytest.approx(2**30 / 1e8)
    assert math.isnan(Group("communication", 1.0, 1.0, 1.0, 0.0, 1).floor_ms(1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "around", "group"),
    [
        ("aten::addmm", (), "products"),
        ("aten::mm", ("flashjvp::backward",), "attention"),
        ("sm90_xmma_gemm_bf16", (f"{BACKWARD}: X",), "products"),
        ("aten::mul", (f"{BACKWARD}: X", "aten::x"), "elementwise backward"),
        ("aten::mul", (), "elementwise forward"),
        ("copy", ("FSDP::all_gather (blocks.0)",), "communication"),
        ("void at::native::lpnorm_cleanup", (), "optimizer"),
        ("aten::mul", ("aten::add", OPTIMIZER), "optimizer"),
        ("aten::embedding", (), "elementwise forward"),  # not "dot", "mm", "addmm" in the middle of a word
    ],
)
def test_the_group_of_a_name(name: str, around: tuple[str, ...], group: str) -> None:
    assert group_of(name, around) == group


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="trace: expected a step"):
        groups({"traceEvents": []})


def test_views_move_nothing() -> None:
    args = {"Input Dims": [[8, 8]], "Input type": [FLOAT]}
    for name in ("aten::as_strided", "aten::_unsafe_view", "aten::t", "aten::detach", "aten::empty_like"):
        assert work_of({"name": name, "args": args}) == (0.0, 0.0)
    assert work_of({"name": "aten::tanh", "args": args})[0] * 2**30 == 2 * 8 * 8 * 4


def test_a_recorded_trace_of_a_cpu(tmp_path: Path) -> None:
    weight, x = torch.randn(32, 32, requires_grad=True), torch.randn(2, 1, 8, 32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as traced:
        for _ in range(2):
            with record_function(STEP):
                q = (x @ weight).tanh()
                flashjvp.attention(q, q, q, backend="reference").sum().backward()
                with record_function(OPTIMIZER):
                    weight.detach().mul_(0.5)
    traced.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    found = {group.group: group for group in groups(trace)}
    for name in set(GROUPS) - {"communication"}:
        assert found[name].ms > 0, name
    assert found["communication"].kernels == 0
    whole = sum(event["dur"] for event in trace["traceEvents"] if event["name"] == STEP) / 2e3
    assert sum(group.ms for group in found.values()) == pytest.approx(whole)
    # x @ weight, and in the backward pass the gradient of weight alone, since x has none
    assert found["products"].tflop == pytest.approx(2 * 2 * 16 * 32 * 32 / 1e12)
    assert found["products"].gib * 2**30 >= 4 * 2 * (2 * 16 * 32 + 32 * 32)


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("kind", ["mm", "addmm", "bmm", "baddbmm"])
def test_a_product_counts_its_factors_wherever_it_writes(kind: str, given: bool, tmp_path: Path) -> None:
    batch = (3,) if "bmm" in kind else ()
    left, right, out = torch.randn(*batch, 48, 16), torch.randn(*batch, 16, 8), torch.empty(*batch, 48, 8)
    added = [torch.randn(*batch, 48, 8)] if "add" in kind else []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as traced:
        getattr(torch, kind)(*added, left, right, **{"out": out} if given else {})
    traced.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    gib, tflop = work_of(next(event for event in events if event["name"] == f"aten::{kind}"))
    assert tflop * 1e12 == pytest.approx(2 * left.numel() * 8)
    assert gib * 2**30 == 4 * sum(x.numel() for x in (*added, left, right, out))


def test_the_table_and_the_figure_have_every_group(tmp_path: Path) -> None:
    fixed = {"preset": "p", "precision": "b", "compile": "on", "checkpointing": "none", "cuda_graph": "off"}
    fixed |= {"parallel": "ddp", "gpus": 1, "batch": 8, "objective": "tvm", "detach": False, "tokens": 4}
    fixed |= {"accumulate": 1, "tbytes_per_s": 4.2, "tflops": 700.0, "torch": "t", "device": "d", "commit": "c"}
    fixed |= {"residual": "float32"}
    rows = [vars(group) | fixed | {"floor_ms": group.floor_ms(4.2, 700.0)} for group in recorded().groups().values()]
    data = pd.DataFrame(rows)[list(PROFILE_COLUMNS)]
    table = profile_table(data)
    assert all(f"| {name} |" in table for name in GROUPS) and "| step | 1.0 |" in table
    draw_profile(pd.concat([data, data.assign(batch=16), data.assign(residual="bfloat16")]), tmp_path / "bar.png")
    assert (tmp_path / "bar.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_tells_all_rows_of_a_run_apart() -> None:
    settings = STEP_COLUMNS[: STEP_COLUMNS.index("ms_per_step")]
    assert set(STEP_OF) >= set(settings) - {"trainer"}  # of which one is traced
