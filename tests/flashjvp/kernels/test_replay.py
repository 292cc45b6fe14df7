"""Capture and replay of calls: what is replayed, with which tensors, and what never is.

Stand-ins take the place of kernels, of which only compiled launches are captured.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.runtime import driver

from flashjvp import _torch, environment
from flashjvp.kernels.launch import replay
from flashjvp.kernels.launch.call import Call
from flashjvp.operands import PlainOperands

Maybe = Tensor | None


class Kernel:
    """Stands for a jitted kernel; keeps what launches of the compiled one are given."""

    arg_names = ("q", "scale", "batch_shape", "M", "N", "heads", "group", "K_COLUMNS", "CAUSAL", "REGULAR")

    def __init__(self) -> None:
        self.fn = object()
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if len(grid) == 1:  # compiles and launches
            return lambda *args, **options: self
        return lambda *args: self.launches.append(args)


KERNEL = Kernel()
RUNS: list[str] = []


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Maybe = None


@replay.captured(Tensors)
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, how: str, scale: float) -> tuple[Tensor, Maybe, Tensor]:
    """As a backend allocates and launches."""
    RUNS.append(how)
    call = Call(q, k, v, mask, False)
    o, lse = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2), q.new_zeros(q.shape[:-1], dtype=torch.float32)
    if how == "copies":
        k = k.clone()
    if how == "writes":
        lse += 1
    args = (*call.operands(q, k, v), call.mask, *call.operands(o), lse)
    call.launch(KERNEL, "forward", call.query_programs(64), args, scale)
    return o[:, :1] if how == "takes a part" else o, None, lse


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    environment.forget()
    before = vars(driver).copy()
    driver.set_active(SimpleNamespace(get_current_stream=lambda device: 0))
    replay.forget()
    RUNS.clear()
    KERNEL.launches.clear()
    yield
    replay.forget()
    vars(driver).clear()
    vars(driver).update(before)
    environment.forget()


def tensors(count: int = 3, dtype: torch.dtype = torch.float16, length: int = 32) -> list[Tensor]:
    return [torch.randn(1, 2, length, 16).to(dtype) for _ in range(count)]


def addresses(args: tuple[Any, ...]) -> list[Any]:
    return [x[0] if isinstance(x, tuple) else x for x in args[:6]]


@pytest.mark.parametrize("allocates", ["directly", "where there is no such way", "in deterministic mode"])
def test_the_third_call_is_replayed_with_its_own_tensors(allocates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(allocates == "in deterministic mode", warn_only=True)
    if allocates == "where there is no such way":
        monkeypatch.setattr(_torch, "EMPTY_STRIDED", {})
    kept = []
    for _ in range(5):
        q, k, v = tensors()
        o, none, lse = attend(q, k, v, None, "once", 0.5)
        kept.append((q, k, v, o, lse))
        assert none is None and o.shape == q.shape and o.stride() == (1024, 16, 32, 1) and o.dtype == q.dtype
        assert lse.shape == (1, 2, 32) and lse.dtype == torch.float32 and not lse.any()
        lse.fill_(1.0)
    assert len(RUNS) == 2
    assert len({x.data_ptr() for row in kept for x in row}) == 25
    for given, (q, k, v, o, lse) in zip(KERNEL.launches, kept[1:], strict=True):
        assert addresses(given) == [q.data_ptr(), k.data_ptr(), v.data_ptr(), None, o.data_ptr(), lse.data_ptr()]
        assert [x[1:] for x in given[:3]] == [x[1:] for x in KERNEL.launches[0][:3]]
        assert given[6:] == KERNEL.launches[0][6:]
    for x in (o, lse):  # as from the dispatcher
        assert torch._C._dispatch_keys(x) == torch._C._dispatch_keys(torch.empty_like(x))
        assert x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.nbytes and x._base is None


def test_a_mask_is_replayed_as_the_launch_takes_it() -> None:
    masks = [torch.rand(1, 1, 32, 32) > 0.5 for _ in range(4)]
    for mask in masks:
        attend(*tensors(), mask, "once", 0.5)
    assert len(RUNS) == 2 and addresses(KERNEL.launches[-1])[3] == masks[-1].data_ptr()


@pytest.mark.parametrize("how", ["copies", "writes", "takes a part"])
def test_a_call_that_does_more_is_never_replayed(how: str) -> None:
    for _ in range(4):
        attend(*tensors(), None, how, 0.5)
    assert len(RUNS) == 4


def test_a_tensor_given_twice_is_never_captured() -> None:
    """Which argument an address stands for would be a guess."""
    q, k, v = tensors()
    for _ in range(4):
        attend(q, q, v, None, "once", 0.5)
    attend(q, k, v, None, "once", 0.5)
    assert len(RUNS) == 5 and addresses(KERNEL.launches[-1])[:2] == [q.data_ptr(), k.data_ptr()]


def test_addresses_off_16_bytes_are_not_replayed() -> None:
    for _ in range(3):
        attend(*tensors(), None, "once", 0.5)
    q, k, v = tensors()
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    attend(odd, k, v, None, "once", 0.5)
    assert len(RUNS) == 3


def test_masks_off_the_alignment_of_their_loads_are_not_replayed() -> None:
    memory = torch.zeros(32 * 32 + 32)
    here, moved = (memory[start : start + 32 * 32].view(1, 1, 32, 32) for start in (0, 4))
    for mask in (here, here, here, moved):
        attend(*tensors(), mask, "once", 0.5)
    assert len(RUNS) == 3


DIFFERENT: dict[str, Callable[[], Any]] = {
    "length": lambda: attend(*tensors(length=31), None, "once", 0.5),
    "dtype": lambda: attend(*tensors(dtype=torch.bfloat16), None, "once", 0.5),
    "strides": lambda: attend(*[x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()], None, "once", 0.5),
    "scale": lambda: attend(*tensors(), None, "once", 0.25),
    "mask": lambda: attend(*tensors(), torch.ones(1, 1, 32, 32, dtype=torch.bool), "once", 0.5),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_call_is_captured_for_itself(name: str) -> None:
    for _ in range(3):
        attend(*tensors(), None, "once", 0.5)
    for _ in range(3):
        DIFFERENT[name]()
    attend(*tensors(), None, "once", 0.5)
    assert len(RUNS) in (3, 4)  # at once where only a guard tells them apart


def test_fresh_memory_is_filled_in_deterministic_mode() -> None:
    """As PyTorch fills it, so that tests see what is never written. Elsewhere that would cost a launch."""
    for _ in range(4):
        o, _, _ = attend(*tensors(), None, "once", 0.5)
    assert len(RUNS) == 2 and o.isnan().all()


def bound(like: list[Tensor], scale: float = 0.5) -> Callable[..., Any]:
    bind: Callable[..., Any] = attend.bind  # type: ignore[attr-defined]
    call: Callable[..., Any] = bind(PlainOperands(*like), ("once", scale))
    return call


def test_what_is_bound_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bound(tensors())
    for _ in range(3):
        call([*tensors(), None])
    assert len(RUNS) == 2
    monkeypatch.setattr(replay.TensorKeyedCache, "find", None)
    for _ in range(2):
        q, k, v = tensors()
        o, _, lse = call([q, k, v, None])
        given = KERNEL.launches[-1]
        assert addresses(given) == [q.data_ptr(), k.data_ptr(), v.data_ptr(), None, o.data_ptr(), lse.data_ptr()]
        assert given[6] == 0.5
    assert len(RUNS) == 2


def test_what_is_bound_sees_what_else_decides() -> None:
    call = bound(tensors())

    def runs(*given: Tensor) -> int:
        before = len(RUNS)
        call([*(given or tensors()), None])
        return len(RUNS) - before

    assert [runs() for _ in range(4)] == [1, 1, 0, 0]
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)
    assert [runs() for _ in range(3)] == [1, 1, 0]
    replay.forget()
    assert [runs() for _ in range(3)] == [1, 1, 0]
    q, k, v = tensors()
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert [runs(odd, k, v), runs()] == [1, 0]
    other = bound(tensors(), scale=0.25)
    for _ in range(3):
        other([*tensors(), None])
    assert KERNEL.launches[-1][6] == 0.25 and runs() == 0 and KERNEL.launches[-1][6] == 0.5


def test_deterministic_mode_has_its_own_captured_calls() -> None:
    for _ in range(3):
        attend(*tensors(), None, "once", 0.5)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)
    attend(*tensors(), None, "once", 0.5)
    assert len(RUNS) == 3


def test_what_decides_about_launches_may_change() -> None:
    for _ in range(3):
        attend(*tensors(), None, "once", 0.5)
    replay.forget()
    attend(*tensors(), None, "once", 0.5)
    assert len(RUNS) == 3


@pytest.mark.parametrize("is_bound", [False, True])
def test_captured_calls_keep_no_tensor_alive(is_bound: bool) -> None:
    died = []
    call = None
    for _ in range(4):
        q, k, v = tensors()
        call = call or bound([q, k, v])
        o, _, lse = call([q, k, v, None]) if is_bound else attend(q, k, v, None, "once", 0.5)
        died += [weakref.ref(x) for x in (q, k, v, o, lse)]
    del q, k, v, o, lse
    gc.collect()
    assert not any(x() is not None for x in died)
