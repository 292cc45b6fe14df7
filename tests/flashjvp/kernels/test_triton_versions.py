"""Which Tritons the warp-specialised kernels serve with, what a self-check decides, and that defaults of Triton do not
matter."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashjvp import environment
from flashjvp.backends import reference
from flashjvp.backends.patterns import Listed
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import compilation, schedule, selfcheck
from flashjvp.kernels.launch.hopper_tables import MEASURED, MEASURED_MASKS, MEASURED_WIDE, PIPELINES, REGISTER_OPERANDS

ROOT = Path(__file__).resolve().parents[3]
CARD = torch.device("cuda", 0)


@pytest.fixture
def calls(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str | None]]:
    """A card that was never seen, a Triton that is not known, and checks that say what is popped from the list."""
    answers: list[Any] = []

    def checked(device: torch.device, width: int) -> str | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    machine(triton_release=(99, 0), capability=(9, 0), device_name="a card", is_amd=False, is_capturing=False)
    machine(triton_cache=tmp_path / "cache")
    monkeypatch.setattr(selfcheck, "_checked", checked)
    yield answers
    assert not answers


def are_served(width: int = 64) -> bool:
    return bool(schedule.pipelines(CARD, "half", width))


def test_a_check_that_holds_is_made_once_and_kept(calls: list[Any]) -> None:
    calls.append(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert are_served() and are_served()
        environment.forget()  # as a new process
        assert are_served() and schedule.why_not_pipelines(CARD, "half", 64) is None


@pytest.mark.parametrize(
    ("spilled", "wrong", "said"),
    [
        (18, None, None),
        (32, None, "forward_kernel spills 32 registers"),
        (0, "forward_jvp", "o_t is wrong .D = 64, 192 rows.: .* times the precision of its type"),
        (0, "backward", "d_k is wrong .D = 64, 192 rows.: inf times"),
    ],
)
def test_a_check_looks_at_results_and_spills(
    spilled: int, wrong: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_kernel() -> None: ...

    compiled: dict[tuple[Any, ...], Any] = {(object(),): SimpleNamespace(n_spills=100)}  # what was there before

    def computed(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            compiled[(forward_kernel, name)] = SimpleNamespace(n_spills=spilled)
            results = list(getattr(reference, name)(*args))
            if name == wrong:
                results[1] = results[1] + (1.0 if name == "forward_jvp" else math.inf)
            return results

        return run

    backend = SimpleNamespace(**{x: computed(x) for x in ("forward", "forward_jvp", "backward", "backward_jvp")})
    monkeypatch.setattr(selfcheck, "SUBJECT", [(backend, SimpleNamespace(_COMPILED=compiled))])
    with ThreadPoolExecutor(1) as thread:  # the check marks its thread
        found = thread.submit(selfcheck._checked, torch.device("cpu"), 64).result()
    assert found is None if said is None else re.fullmatch(f"{said}.*", found)


def test_what_a_check_needs_is_compiled_side_by_side_before_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    collecting: list[bool] = []
    together: list[str] = []

    def asked(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if (found := compilation.THREAD.collected) is not None:
                compiles = partial(together.append, name)
                found[name] = SimpleNamespace(key=name, compile=compiles, keep=lambda promise: None)
            collecting.append(found is not None)
            return getattr(reference, name)(*args)

        return run

    backend = SimpleNamespace(**{x: asked(x) for x in ("forward", "forward_jvp", "backward", "backward_jvp")})
    monkeypatch.setattr(selfcheck, "SUBJECT", [(backend, SimpleNamespace(_COMPILED={}))])
    for check in (selfcheck._checked, selfcheck._checked_card):
        collecting.clear()
        together.clear()
        with ThreadPoolExecutor(1) as thread:  # the check marks its thread
            what: Any = 64 if check is selfcheck._checked else torch.bfloat16
            assert thread.submit(check, torch.device("cpu"), what).result() is None
        assert sorted(together) == sorted(vars(backend)) and collecting == sorted(collecting, reverse=True)


def test_the_backend_is_what_is_checked() -> None:
    from flashjvp.backends import triton as backend
    from flashjvp.kernels.launch import call

    assert [(backend, call)] == selfcheck.SUBJECT


def test_each_padded_head_dim_is_checked_by_itself(calls: list[Any]) -> None:
    calls += [None, "d_k is wrong", None, "o is wrong"]
    for _ in range(2):
        assert [are_served(width) for width in (64, 96, 128, 64, 192)] == [True, False, True, True, False]
        environment.forget()  # as a new process


def test_a_check_that_fails_is_kept(calls: list[Any]) -> None:
    calls.append("d_k is wrong")
    for _ in range(2):
        assert not are_served() and not are_served()
        assert re.search("d_k is wrong.*Install a Triton", schedule.why_not_pipelines(CARD, "half", 64) or "")
        environment.forget()  # as a new process


def test_what_a_check_raised_is_asked_again_in_another_process(calls: list[Any]) -> None:
    calls += [RuntimeError("no memory"), None]
    assert not are_served() and not are_served()
    assert "RuntimeError: no memory" in (schedule.why_not_pipelines(CARD, "half", 64) or "")
    environment.forget()  # as a new process
    assert are_served()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"reason": 3}', "\x80"])
def test_a_broken_file_is_no_answer(text: str, calls: list[Any]) -> None:
    calls.append(None)
    path = selfcheck._path("a card", "D = 64")
    path.parent.mkdir()
    path.write_text(text)
    assert are_served()
    assert json.loads(path.read_text()) == {"reason": None}
    assert list(path.parent.iterdir()) == [path]


def test_without_a_place_to_keep_it_a_check_counts(calls: list[Any], tmp_path: Path) -> None:
    calls.append(None)
    (tmp_path / "cache").write_text("no folder")
    assert are_served()


def test_no_check_while_a_graph_is_captured(calls: list[Any], machine: Callable[..., None]) -> None:
    calls.append(None)
    machine(is_capturing=True)
    assert not are_served()
    machine(is_capturing=False)
    assert are_served()


def test_threads_wait_for_one_check_whose_own_calls_are_served(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def checked(device: torch.device, width: int) -> None:
        selfcheck._THREAD.checks = True
        time.sleep(0.05)
        seen.append(are_served())

    monkeypatch.setattr(selfcheck, "_checked", checked)
    threads = [threading.Thread(target=lambda: seen.append(are_served())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 5


def test_an_older_triton_is_not_checked(calls: list[Any], machine: Callable[..., None]) -> None:
    machine(triton_release=(3, 5))
    assert not are_served()
    assert "need Triton 3.6 or newer" in (schedule.why_not_pipelines(CARD, "half", 64) or "")


@pytest.mark.parametrize(
    ("release", "width"),
    [*((release, 64) for release in MEASURED), *((release, 192) for release in MEASURED_WIDE)],
    ids=str,
)
def test_measured_ones_are_served_unasked(
    release: tuple[int, int], width: int, calls: list[Any], machine: Callable[..., None]
) -> None:
    machine(triton_release=release)
    assert are_served(width)


def test_masks_that_were_not_measured_say_so(machine: Callable[..., None]) -> None:
    def why_not(mask: torch.Tensor | None, pattern: Any = None, width: int = 64) -> str | None:
        call: Any = SimpleNamespace(pattern=pattern, mask=mask, mask_tensor=mask, device=CARD, width=width)
        return eligibility.unmeasured(call)

    additive, boolean = torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    machine(triton_release=(99, 0))
    assert "an additive mask with another Triton" in (why_not(additive) or "")
    assert "a block mask with another Triton" in (why_not(None, Listed()) or "")
    assert why_not(boolean) is why_not(None) is why_not(None, width=192) is None
    assert "a mask at head dims above 128 with another Triton" in (why_not(boolean, width=192) or "")
    machine(triton_release=MEASURED_MASKS[0])
    assert why_not(additive) is why_not(None, Listed()) is why_not(boolean, width=192) is None


def test_why_not_in_words(calls: list[Any], machine: Callable[..., None]) -> None:
    machine(triton_release=MEASURED[0])
    assert "head dims padded to 48, but to 64, 80, 96, 128" in (schedule.why_not_pipelines(CARD, "half", 48) or "")
    assert "TF32" in (schedule.why_not_pipelines(CARD, "ieee", 64) or "")
    assert "interpreter" in (schedule.why_not_pipelines(torch.device("cpu"), "half", 64) or "")
    machine(capability=(8, 0))
    assert "not for sm_80" in (schedule.why_not_pipelines(CARD, "half", 64) or "")
    assert not schedule.pipelines(CARD, "half", 64)


def test_fewer_tiles_are_held_from_one_release_on() -> None:
    before, since = (schedule._tiles(PIPELINES["sm_90"], release) for release in ((3, 6), (3, 10)))
    assert before == PIPELINES["sm_90"]
    for (width, kind, family), count in REGISTER_OPERANDS.items():
        assert (
            since[width][kind][family]
            == before[width][kind][family]._replace(register_operands=count)
            != before[width][kind][family]
        )


@pytest.mark.gpu
def test_the_check_holds_here() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    from flashjvp.backends import triton  # noqa: F401, which puts itself before the check

    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    checks: dict[str, Callable[[], str | None]] = {
        f"D = {width}": partial(selfcheck._checked, CARD, width) for width in PIPELINES["sm_90"]
    }
    checks |= {
        str(x): partial(selfcheck._checked_card, CARD, x) for x in (torch.bfloat16, torch.float16, torch.float32)
    }
    for what, check in checks.items():
        assert selfcheck._remembered(torch.cuda.get_device_name(), what, check) is None
    assert all(map(torch.equal, states, (torch.get_rng_state(), torch.cuda.get_rng_state())))


PTX = """
import hashlib, sys
from verify.codegen import command as codegen
from verify.codegen import worker as codegen_runs
found = []
codegen_runs.measure = lambda compiled: found.append(compiled.asm["ptx"]) or {}
d = int(sys.argv[1])
codegen_runs.compile_all(codegen.Configuration("sm_90", "half", d, d, tangents=""))
print(len(found), hashlib.sha256("".join(found).encode()).hexdigest())
"""


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("d", [16, 64])
def test_fusion_of_products_with_sums_is_no_default_of_tritons(d: int, tmp_path: Path) -> None:
    said = []
    for default in ("0", "1"):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_DEFAULT_FP_FUSION": default, "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", PTX, str(d)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1] and int(said[0].split()[0]) == 4
