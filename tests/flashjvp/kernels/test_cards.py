"""Cards that nobody measured: which tiles they get, and the check that they have to pass on first use."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashjvp import FlashJVPPerformanceWarning, UnsupportedError, environment, support
from flashjvp.backends import reference, select
from flashjvp.backends.select import MAX_IEEE_IN_99_KB, WITH_99_KB
from flashjvp.kernels.launch import schedule, selfcheck

CARD = torch.device("cuda", 0)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0))
BACKEND = ("forward", "forward_jvp", "backward", "backward_jvp")


@pytest.fixture
def checks(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """An RTX 4090 that was never seen, and checks that say what is popped from the list."""
    answers: list[Any] = []

    def checked(device: torch.device, dtype: torch.dtype) -> str | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    machine(capability=(8, 9), device_name="a card", is_amd=False, is_capturing=False, triton_cache=tmp_path / "cache")
    monkeypatch.setattr(selfcheck, "_checked_card", checked)
    yield answers
    assert not answers


def served(dtype: torch.dtype = torch.bfloat16) -> str:
    return select.resolve(None, CARD, dtype).__name__.rsplit(".", 1)[1]


def test_a_check_that_holds_is_made_once_for_each_type_and_kept(checks: list[Any]) -> None:
    checks += [None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert {served(dtype) for dtype in (torch.bfloat16, torch.float32) for _ in range(2)} == {"triton"}
            environment.forget()  # as a new process


@pytest.mark.parametrize("answer", ["o_t is wrong", RuntimeError("ptxas knows no sm_89")], ids=["wrong", "raises"])
def test_a_check_that_fails_gives_plain_pytorch_and_one_warning(answer: Any, checks: list[Any]) -> None:
    checks.append(answer)
    with pytest.warns(FlashJVPPerformanceWarning, match=r"tiled.*(o_t is wrong|ptxas knows no sm_89)") as said:
        assert [served() for _ in range(3)] == ["tiled"] * 3
    assert len(said) == 1
    with pytest.raises(UnsupportedError, match=r"^backend: 'triton' expected kernels that are right on this card"):
        select.check("triton", CARD, torch.bfloat16)


def test_while_a_graph_is_captured_nothing_is_decided(checks: list[Any], machine: Callable[..., None]) -> None:
    checks.append(None)
    machine(is_capturing=True)
    with pytest.warns(FlashJVPPerformanceWarning, match="may be no capture of a graph"):
        assert served() == "tiled"
    machine(is_capturing=False)
    assert served() == "triton"


def test_the_check_takes_the_kernels_for_what_they_are_and_gives_no_other_card_a_check(
    checks: list[Any], machine: Callable[..., None]
) -> None:
    """`checks` is empty: one that was made would fail."""
    machine(capability=(9, 0))
    assert served() == "triton"
    machine(capability=(7, 5))
    with pytest.warns(FlashJVPPerformanceWarning, match="got .7, 5"):
        assert served() == "tiled"


@pytest.mark.parametrize(
    ("dtype", "wrong", "said"),
    [
        (torch.float32, "", None),
        (torch.float32, "forward_jvp in tf32", "o_t is wrong"),
        (torch.float32, "backward in ieee", "d_k is wrong"),
        (torch.float16, "forward_jvp in half", "o_t is wrong"),
    ],
)
def test_a_check_compares_every_kind_of_product_with_float64(
    dtype: torch.dtype, wrong: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def computed(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            kind = schedule.input_precision(args[0].dtype, torch.device("meta"))
            asked.append(f"{name} in {kind}")
            results = list(getattr(reference, name)(*args))
            if asked[-1] == wrong:
                results[1] = results[1] * 1.01
            return results

        return run

    backend = SimpleNamespace(**{name: computed(name) for name in BACKEND})
    monkeypatch.setattr(selfcheck, "SUBJECT", [(backend, None)])
    with ThreadPoolExecutor(1) as thread:  # the check marks its thread
        found = thread.submit(selfcheck._checked_card, torch.device("cpu"), dtype).result()
    assert found is None if said is None else said in (found or "")
    kinds = ("tf32", "ieee") if dtype == torch.float32 else ("half",)
    if said is None:
        assert set(asked) == {f"{name} in {kind}" for name in BACKEND for kind in kinds}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_card_of_the_table_has_tiles_for_every_head_dim(
    capability: tuple[int, int], machine: Callable[..., None]
) -> None:
    assert support.tried(capability) == support.COMPILED
    machine(capability=capability)
    tiles = schedule.TABLES[schedule.architecture(CARD)]
    for kind in ("half", "tf32", "ieee"):
        most = MAX_IEEE_IN_99_KB if kind == "ieee" and capability in WITH_99_KB else 256
        for width in {sum(schedule.chunk_widths(d, "half")) for d in range(1, most + 1)}:
            four = width <= 64
            families = {name for name in tiles[kind] if four or name != "backward_key_value"}
            assert all(schedule.lookup(CARD, kind, name, width).block_m >= 16 for name in families)
    assert {name for kind in tiles.values() for name in kind} == set(schedule.TABLES["sm_90"]["half"])


def test_other_cards_have_none() -> None:
    assert {support.tried(x) for x in ((7, 5), (8, 7), (11, 0), (12, 1))} == {None}
