"""The fast tier keeps what its marks promise: pairs, a rotating sample, everything that is not marked."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiers

CONFTEST = Path(__file__).with_name("conftest.py")
MARKED = """
from dataclasses import dataclass
import pytest

@dataclass(frozen=True)
class Case:
    name: str
    mask: str
    causal: bool

CASES = [Case(f"{mask}-{causal}-{n}", mask, causal) for mask in "abc" for causal in (True, False) for n in range(5)]

@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs(case, dtype): pass

@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("n", range(10))
def test_sample(n): pass

@pytest.mark.parametrize("compiler", ["quick", pytest.param("long", marks=pytest.mark.slow)])
def test_slow(compiler): pass

@pytest.mark.sampled(of=4)
def test_alone(): pass

@pytest.mark.gpu
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize("n", range(10))
def test_gpu(n): pass
"""


def collected(folder: Path, tier: str) -> list[str]:
    """Names of the tests of MARKED that a tier runs, each without its file."""
    (folder / "test_marked.py").write_text(MARKED)
    options = ["--tier", tier, "-p", "tests.conftest", "--rootdir", str(CONFTEST.parents[1])]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, str(folder)]
    done = subprocess.run(command, cwd=CONFTEST.parents[1], capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_every_pair_occurs_in_about_as_few_rows_as_can_be() -> None:
    rows = [
        {"a": str(a), "b": str(b), "c": str(c), "d": str(d)} for a, b, c, d in itertools.product(range(3), repeat=4)
    ]
    kept = [rows[place] for place in tiers.pairwise(rows)]
    for one, other in itertools.combinations("abcd", 2):
        assert {(row[one], row[other]) for row in kept} == set(itertools.product("012", "012"))
    assert 9 <= len(kept) <= 15  # of 81


def test_pairs_that_never_occur_are_not_missed() -> None:
    assert tiers.pairwise([{"a": "1", "b": "1"}, {"a": "2", "b": "2"}, {"a": "1", "b": "1"}]) == {0, 1}
    assert tiers.pairwise([{"a": "1"}, {"a": "1"}, {"a": "2"}]) == {0, 2}
    assert tiers.pairwise([]) == set()


@pytest.mark.parametrize(("count", "of"), [(10, 4), (3, 4), (1, 4), (0, 4), (7, 1)])
def test_successive_numbers_choose_every_name(count: int, of: int) -> None:
    names = [f"name {n}" for n in range(count)]
    samples = [tiers.sample(names, of, 12345 + n) for n in range(of)]
    assert {*itertools.chain(*samples)} == {*names}
    assert all(len(chosen) in (count // of, count // of + 1) or count < of for chosen in samples)
    assert all(samples) or not names


def test_the_fast_tier_keeps_some_of_every_test(tmp_path: Path) -> None:
    fast, everything = collected(tmp_path, "fast"), collected(tmp_path, "all")
    assert set(fast) < set(everything)
    assert len(everything) == 120 + 10 + 2 + 1 + 10

    def count(names: list[str], test: str) -> int:
        return sum(name.partition("[")[0] == test for name in names)

    assert count(fast, "test_pairs") == 12  # masks and types; with these every other pair
    assert count(fast, "test_sample") in (2, 3)
    assert [name for name in fast if "test_slow" in name] == ["test_slow[quick]"]
    assert (count(fast, "test_alone"), count(fast, "test_gpu")) == (1, 10)


def test_a_list_is_sampled_likewise(request: pytest.FixtureRequest, sampled: Callable[..., list[str]]) -> None:
    fast = request.config.getoption("--tier") == "fast"
    assert len(sampled([str(n) for n in range(9)], of=3)) == (3 if fast else 9)


def test_outside_of_git_the_sample_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert tiers.commit.__wrapped__() == 0
