"""Work in parts by several processes: every part is made once, whoever makes it, and what is finished is kept."""

import io
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tvm_ref import unfinished
from tvm_ref.training.checkpoint import ALONE
from tvm_ref.training.parallel import World
from tvm_ref.training.run_lock import RunLockedError
from tvm_ref.unfinished import Tensors, Unfinished, UnfinishedError, beside, is_delivered, together


@dataclass(frozen=True)
class Meeting:
    """Where threads that stand for processes hand each other values."""

    values: list[Any]
    barrier: threading.Barrier


@dataclass(frozen=True)
class ThreadWorld(World):
    """A process group whose processes are threads."""

    meeting: Meeting | None = None

    def gather(self, value: Any) -> list[Any]:
        assert self.meeting is not None
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait(60)
        values = list(self.meeting.values)
        self.meeting.barrier.wait(60)
        return values


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What work(world) returned or raised in each of `size` threads."""
    meeting = Meeting([None] * size, threading.Barrier(size))

    def one(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, size, torch.device("cpu"), meeting=meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def content(name: str) -> Tensors:
    return {"x": torch.full((2, 3), float(len(name) * 100 + int(name.split("-")[1])))}


@settings(max_examples=20)
@given(data=st.data(), count=st.integers(0, 9), size=st.integers(1, 4))
def test_every_part_is_made_once_by_whoever_makes_it(data: st.DataObject, count: int, size: int) -> None:
    names = [f"part-{i}" for i in range(count)]
    before = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))
    calls: list[list[str]] = [[] for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "x.json"
        with Unfinished(out, {}, ALONE) as work:
            for name in before:
                work.write(name, content(name))

        def work_on(world: World) -> bool:
            def make(name: str) -> Tensors:
                calls[world.rank].append(name)
                return content(name)

            with Unfinished(out, {}, world) as work:
                return work.complete(names, make, title="parts")

        assert in_threads(size, work_on) == [True] * size
        made = [name for each in calls for name in each]
        assert set(made) == set(names) - before and len({len(each) for each in calls}) == 1
        assert len(made) < len(set(made)) + size
        with Unfinished(out, {}, ALONE) as work:
            assert all(torch.equal(work.read(name)["x"], content(name)["x"]) for name in names)
        assert beside(out).exists() == (count > 0)


@settings(max_examples=20)
@given(data=st.data(), count=st.integers(1, 9), size=st.integers(1, 4), fails=st.booleans())
def test_a_stop_or_a_failure_in_one_process_ends_all_and_keeps_the_rest(
    data: st.DataObject, count: int, size: int, fails: bool
) -> None:
    names = [f"part-{i}" for i in range(count)]
    last = data.draw(st.sampled_from(names))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "x.json"

        def work_on(world: World, to_the_end: bool = False) -> bool:
            seen: list[str] = []

            def make(name: str) -> Tensors:
                seen.append(name)
                if fails and not to_the_end and name == last:
                    raise ValueError(f"cannot make {name}")
                return content(name)

            stop = (lambda: False) if fails or to_the_end else (lambda: last in seen)
            with Unfinished(out, {}, world) as work:
                return work.complete(names, make, stop=stop, title="parts")

        outcomes = in_threads(size, work_on)
        if fails:
            assert all(isinstance(x, ValueError) and f"cannot make {last}" in str(x) for x in outcomes)
        else:
            assert len(set(outcomes)) == 1
        parts = sorted(path.stem for path in beside(out).glob("*.part"))
        assert fails <= (last not in parts)
        assert in_threads(size, lambda world: work_on(world, to_the_end=True)) == [True] * size
        with Unfinished(out, {}, ALONE) as work:
            assert all(torch.equal(work.read(name)["x"], content(name)["x"]) for name in names)


def test_other_settings_and_a_second_user_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    with Unfinished(out, {"w": 1.5, "seed": 0}, ALONE) as work:
        work.write("part-0", content("part-0"))
        with pytest.raises(RunLockedError, match=r"out: .*which process \d+ on .* is using: .*another --out"):
            Unfinished(out, {"w": 1.5, "seed": 0}, ALONE)
    with pytest.raises(UnfinishedError, match=r"other settings \(w: 1.5 before, 2.0 now\): give the same"):
        Unfinished(out, {"w": 2.0, "seed": 0}, ALONE)
    assert all(
        isinstance(error, UnfinishedError) and "w: 1.5 before" in str(error)
        for error in in_threads(3, lambda world: Unfinished(out, {"w": 2.0, "seed": 0}, world))
    )
    with Unfinished(out, {"w": 1.5, "seed": 0}, ALONE) as work:
        assert work.has("part-0")


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, place: int) -> None:
    out = tmp_path / "x.json"
    with Unfinished(out, {}, ALONE) as work:
        for name in ("part-0", "part-1"):
            work.write(name, content(name))
        path = work.folder / "part-0.part"
        damaged = bytearray(path.read_bytes())
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UnfinishedError, match=r"part-0\.part was damaged, and is removed"):
            work.read("part-0")
        assert work.complete(["part-0", "part-1"], content, title="parts")
        assert torch.equal(work.read("part-0")["x"], content("part-0")["x"])


def test_what_is_kept_is_said_and_an_empty_folder_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt), Unfinished(out, {}, ALONE):
        raise KeyboardInterrupt
    assert not beside(out).exists() and capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt), Unfinished(out, {}, ALONE) as work:
        work.write("part-0", content("part-0"))
        raise KeyboardInterrupt
    assert f"1 finished parts are kept in {beside(out)}" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), Unfinished(None, {}, ALONE) as work:
        work.write("part-0", content("part-0"))
        raise KeyboardInterrupt
    assert not work.folder.exists() and capsys.readouterr().err == ""


def test_a_bar_shows_parts_total_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of work that goes on, too: parts of earlier runs are counted, but not in the rate."""
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(unfinished, "Console", lambda **_: screen)
    names = [f"part-{i}" for i in range(12)]
    with Unfinished(tmp_path / "x.json", {}, ALONE) as work:
        work.complete(names[:5], content, title="parts")
        assert isinstance(screen.file, io.StringIO)
        screen.file.truncate(0)
        work.complete(names, lambda name: (time.sleep(0.02), content(name))[1], title="parts")
    lines = re.split(r"[\r\n]", screen.file.getvalue())
    found = [match for line in lines if (match := re.search(r"parts +(\d+)/12 .* ([\d.]+)/s +\d+:\d\d +left", line))]
    assert found and {int(match[1]) for match in found} <= {*range(5, 13)}
    assert all(0 < float(match[2]) <= 1 / 0.02 for match in found), lines


def test_a_result_is_delivered_at_once_and_known_afterwards(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    (tmp_path / ".x.json.draft").mkdir()  # of a process that was killed
    with Unfinished(out, {}, ALONE) as work:
        work.write("part-0", content("part-0"))
        out.write_text("of somebody else")
        assert not is_delivered(work.folder, out)
        with pytest.raises(OSError, match="full"):
            work.deliver(out, lambda draft: (draft.write_text("half"), _full()))
        assert out.read_text() == "of somebody else" and not is_delivered(work.folder, out)
        work.deliver(out, lambda draft: draft.write_text(json.dumps({"samples": 1})))
        assert is_delivered(work.folder, out) and json.loads(out.read_text()) == {"samples": 1}
        work.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def _full() -> None:
    raise OSError("the disk is full")


def test_an_error_of_the_first_process_reaches_all() -> None:
    def fail() -> int:
        raise ValueError("bad file")

    outcomes = in_threads(3, lambda world: together(world, fail))
    assert all(isinstance(error, ValueError) and str(error) == "bad file" for error in outcomes)
    assert in_threads(3, lambda world: together(world, lambda: 7)) == [7, 7, 7]
