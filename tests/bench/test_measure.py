import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.cases import make_inputs, require_gradients
from bench.providers import PROVIDERS
from tests.bench.test_cases import make_case
from verify.cases.inputs import Inputs

CPU = torch.device("cpu")


def test_latency_percentiles_are_ordered_and_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    found = measure.latency(measure.Work(lambda _: None), CPU)
    # the clock goes one second a reading: each call lasts one second, and three are made
    assert (found.p20_ms, found.p50_ms, found.p80_ms, found.repeats) == (1000, 1000, 1000, 3)


def test_calls_of_the_warm_up_do_not_count_when_others_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call(_: object) -> None:
        nonlocal now
        now += 0.09 if now < 0.1 else 0.01  # slow while it warms up

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = measure.latency(measure.Work(call), CPU)
    assert found.repeats == measure.REPEATS["cpu"][1]
    assert 9.9 < found.p20_ms <= found.p80_ms < 10.1


def test_a_very_slow_call_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call(_: object) -> None:
        nonlocal now
        now += 1.5 * measure.SLOW_S

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    assert measure.latency(measure.Work(call), CPU).repeats == 1


def test_on_a_gpu_only_the_call_lies_between_the_events_after_a_warm_up_and_with_a_cold_l2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is a list of what it was given."""
    given: list[str] = []
    l2 = 2**20

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            given.append("event")

        def elapsed_time(self, after: "Event") -> float:
            return 1.0

    class Cache:
        def zero_(self) -> None:
            given.append("evict")

    def cache(size: int, **_: Any) -> Cache:
        assert size >= 2 * l2
        return Cache()

    monkeypatch.setattr(measure.torch, "empty", cache)
    monkeypatch.setattr(measure.torch.cuda, "Event", Event)
    monkeypatch.setattr(measure.torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda device: given.append("wait"))
    monkeypatch.setattr(measure.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.04 * given.count("call"))
    work = measure.Work(lambda _: given.append("call"), lambda: given.append("prepare"))
    found = measure.latency(work, torch.device("cuda"))
    once, timed = ["prepare", "call", "wait"], ["prepare", "evict", "event", "call", "event"]
    assert given == once * 3 + timed * 10 + ["wait"]  # 0.1 s to warm up, 0.4 s of calls; the host runs ahead
    assert found.repeats == 10
    given.clear()
    found = measure.latency(work, torch.device("cuda"), repeat_s=0.24)
    assert given == once * 3 + timed * 6 + ["wait"] and found.repeats == 6


def test_on_a_cpu_the_seconds_of_repeats_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call(_: object) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = measure.latency(measure.Work(call), CPU, repeat_s=0.075)
    assert found.repeats == 8 and now < 0.13


def peak_can_be_reset() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.skipif(not peak_can_be_reset(), reason="the system does not let a process reset its peak memory")
def test_peak_memory_counts_what_the_call_takes_and_gives_back() -> None:
    held = torch.ones(2**24)  # 64 MiB that is there before

    def call(_: object) -> object:
        dropped = torch.ones(3 * 2**24)
        return dropped.sum() + held.sum()

    assert 190 <= measure.peak_mib(measure.Work(call), CPU) <= 230
    assert 190 <= measure.peak_mib(measure.Work(call), CPU) <= 230
    assert measure.peak_mib(measure.Work(lambda _: None), CPU) <= 10


@pytest.mark.skipif(not peak_can_be_reset(), reason="the system does not let a process reset its peak memory")
def test_peak_memory_counts_what_was_prepared_and_is_still_held() -> None:
    work = measure.Work(run=lambda kept: kept.sum(), prepare=lambda: torch.ones(3 * 2**24))
    assert 190 <= measure.peak_mib(work, CPU) <= 230


@pytest.mark.parametrize("measured", [measure.latency, measure.host_us])
def test_time_to_prepare_does_not_count(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes(seconds: float, result: str) -> str:
        nonlocal now
        now += seconds
        return result

    def run(state: str) -> None:
        assert state == "prepared"
        takes(1e-3, "")

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = measured(measure.Work(run, lambda: takes(0.5, "prepared")), CPU)
    milliseconds = found / 1e3 if isinstance(found, float) else found.p50_ms
    assert 0.99 < milliseconds < 1.01


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd", "plain-fwd", "plain-bwd", "plain-fwd+bwd"])
def test_a_mode_runs_what_its_name_says(mode: str) -> None:
    case = make_case(mode=mode, dtype="float64")
    inputs = make_inputs(case, CPU)
    if case.backward:
        require_gradients(inputs)
    calls = []

    def attention(x: Inputs) -> tuple[Tensor, ...]:
        calls.append(x)
        return provider(x)

    provider = PROVIDERS["flashjvp-reference"].load()
    work = measure.work(attention, inputs, mode)
    state = work.prepare()
    assert len(calls) == (1 if mode in ("bwd", "plain-bwd") else 0)
    found = work.run(state)
    assert len(calls) == 1
    everything = measure.results(provider, inputs, case.backward)
    expected = everything[-(3 if case.plain else 6) :] if mode in ("bwd", "plain-bwd") else everything
    assert isinstance(found, tuple)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
