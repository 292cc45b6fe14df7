import os

import pytest
import torch

from bench import measure

CPU = torch.device("cpu")


def test_latency_percentiles_are_ordered_and_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    found = measure.latency(lambda: None, CPU)
    # the clock goes one second a reading: each call lasts one second, and three are made
    assert (found.p20_ms, found.p50_ms, found.p80_ms, found.repeats) == (1000, 1000, 1000, 3)


def test_calls_of_the_warm_up_do_not_count_when_others_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.09 if now < 0.1 else 0.01  # slow while it warms up

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = measure.latency(call, CPU)
    assert found.repeats == measure.REPEATS["cpu"][1]
    assert 9.9 < found.p20_ms <= found.p80_ms < 10.1


def test_a_very_slow_call_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 1.5 * measure.SLOW_S

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    assert measure.latency(call, CPU).repeats == 1


def peak_can_be_reset() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.skipif(not peak_can_be_reset(), reason="the system does not let a process reset its peak memory")
def test_peak_memory_counts_what_the_call_takes_and_gives_back() -> None:
    held = torch.ones(2**24)  # 64 MiB that is there before

    def call() -> object:
        dropped = torch.ones(3 * 2**24)
        return dropped.sum() + held.sum()

    assert 190 <= measure.peak_mib(call, CPU) <= 230
    assert 190 <= measure.peak_mib(call, CPU) <= 230
    assert measure.peak_mib(lambda: None, CPU) <= 10
