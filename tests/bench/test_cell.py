from typing import Any

import pytest
import torch

from bench import cell, gate
from bench.providers import PROVIDERS, Provider
from tests.bench import planted
from tests.bench.test_cases import make_case

CPU = torch.device("cpu")


def test_what_cells_have_in_common_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[Any]] = {"load": [], "gate": []}
    check = gate.check

    def load() -> Any:
        found["load"].append(1)
        return planted.right

    def counted(attention: Any, case: Any, *where: Any) -> gate.Verdict:
        found["gate"].append((case.mode, case.queries))
        return check(attention, case, *where)

    monkeypatch.setitem(PROVIDERS, "counted", Provider(name="counted", load=load))
    monkeypatch.setattr(gate, "check", counted)
    monkeypatch.setattr(cell.measure, "BUDGET_S", {"cpu": 0.0})
    monkeypatch.setattr(cell.measure, "HOST_BATCHES", 1)
    cells = cell.Cells(CPU)
    for length in (384, 512):
        for mode in ("fwd", "bwd", "fwd+bwd"):
            sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": length, "keys": length}
            outcome = cells.outcome("counted", make_case(mode=mode, dtype="float32", **sizes))
            assert outcome["status"] == "ok"
            assert outcome["host_us"] > 0 and outcome["peak_mib"] >= 0
    assert len(found["load"]) == 2  # a shape
    assert found["gate"] == [("fwd", 384), ("bwd", 384)]  # both lengths reduce to one, both backwards are judged whole


def test_a_call_to_compile_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(PROVIDERS, "counted", Provider(name="counted", load=lambda: recorded(calls)))
    case = make_case(mode="fwd+bwd", dtype="float32")
    assert cell.Cells(CPU).compiled("counted", case) == {"status": "ok", "reason": ""}
    assert [tuple(x.q.shape) for x in calls] == [(2, 4, 96, 24)] and calls[0].q_t.requires_grad
    monkeypatch.setitem(PROVIDERS, "planted-raise", planted.PLANTED["planted-raise"])
    assert cell.Cells(CPU).compiled("planted-raise", case)["status"] == "error"


def recorded(calls: list[Any]) -> Any:
    def attention(inputs: Any) -> Any:
        calls.append(inputs)
        return planted.right(inputs)

    return attention


def test_a_wrong_result_keeps_its_errors_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "planted-nan", planted.PLANTED["planted-nan"])
    outcome = cell.Cells(CPU).outcome("planted-nan", make_case(mode="fwd", dtype="float32"))
    assert outcome["status"] == "wrong" and outcome["reason"].startswith("o_t nan")
    assert outcome["err_o"] < 1e-3 and outcome["latency_p50_ms"] > 0


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1048576 bytes."), "oom", "1 MiB"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "CUDA out of memory"),
        (MemoryError(), "oom", "MemoryError"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "crashed", "illegal"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "crashed", "illegal"),
        (NotImplementedError("no kernel"), "unsupported", "no kernel"),
        (ModuleNotFoundError("No module named 'jaxtyping'"), "unsupported", "'jaxtyping'"),
        (RuntimeError("No available kernel. Aborting execution."), "unsupported", "No available kernel"),
        (ValueError("one\ntwo"), "error", "ValueError: one two"),
    ],
)  # fmt: skip
def test_an_exception_becomes_a_status_with_its_reason(error: Exception, status: str, reason: str) -> None:
    found = cell.classify(error)
    assert found[0] == status
    assert reason in found[1]
