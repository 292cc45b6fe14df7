"""What the fast tier runs: `make test` takes a part of the long tests, `make test-all` takes everything.

Three marks say which part. Each keeps some of every kind of check, and none concerns tests marked `gpu`. Tests of
hypothesis that take long ask `examples` how many to draw.

- `slow`: nothing, for a test that only repeats at full length what a faster one checks.
- `pairwise`: parameters in which every pair of features occurs that occurs at all. A parameter is a feature; one that
  is a dataclass (a case) has its fields as features, where these have few values.
- `sampled(of=4)`: one in four of the test's parameters, at least one. The commit chooses which, so that all are run
  over some commits. With `pairwise`, one in four of what that leaves out.
"""

import dataclasses
import functools
import hashlib
import heapq
import itertools
import math
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

MOST_VALUES_OF_A_FEATURE = 8
is_fast = False  # conftest.py sets it before it imports any test
Features = dict[str, str]


def left_out(items: Sequence[pytest.Item]) -> set[str]:
    """Node ids of the tests that the fast tier does not run."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("gpu"):
            tests[item.nodeid.partition("[")[0]].append(item)
    return {name for test in tests.values() for name in _left_out_of_test(test)}


def examples(number: int) -> int:
    """How many hypothesis draws of `number`: a third in the fast tier."""
    return math.ceil(number / 3) if is_fast else number


def _left_out_of_test(items: Sequence[pytest.Item]) -> Iterator[str]:
    """Of one test with all its parameters; a mark may stand at a parameter alone."""
    yield from (item.nodeid for item in items if item.get_closest_marker("slow"))
    for marks, group in _by_marks(items).items():
        pairs, of = marks
        kept = pairwise(features(group)) if pairs else set()
        rest = [item.nodeid for place, item in enumerate(group) if place not in kept]
        chosen = set(sample(rest, of, commit())) if of else set()
        yield from (name for name in rest if name not in chosen)


def _by_marks(items: Sequence[pytest.Item]) -> dict[tuple[bool, int], list[pytest.Item]]:
    """The tests that have marks of this file other than `slow`, by what these say."""
    groups: dict[tuple[bool, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        sampled = item.get_closest_marker("sampled")
        marks = item.get_closest_marker("pairwise") is not None, sampled.kwargs["of"] if sampled else 0
        if any(marks) and not item.get_closest_marker("slow"):
            groups[marks].append(item)
    return groups


@functools.cache
def commit() -> int:
    """The hash of the commit that is checked out, as a number; 0 outside of git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout, 16)


def sample(names: Sequence[str], of: int, number: int) -> list[str]:
    """One in `of` of the names, at least one: `of` successive numbers choose every name."""
    shuffled = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    step = max(1, min(of, len(shuffled)))
    return shuffled[number % step :: step]


def pairwise(rows: Sequence[Features]) -> set[int]:
    """Places of rows, about as few as can be, in which every value and every pair of values in a row occurs."""
    wanted = [{*itertools.combinations(sorted(row.items()), 2), *((value,) for value in row.items())} for row in rows]
    missing: set[Any] = set().union(*wanted)
    kept: set[int] = set()
    heap = [(-len(pairs), place) for place, pairs in enumerate(wanted)]
    heapq.heapify(heap)
    while missing:  # greedily the row with the most missing pairs; what a row adds only becomes less
        _, place = heapq.heappop(heap)
        adds = len(wanted[place] & missing)
        if heap and adds < -heap[0][0]:
            heapq.heappush(heap, (-adds, place))
        else:
            kept.add(place)
            missing -= wanted[place]
    return kept


def features(items: Sequence[pytest.Item]) -> list[Features]:
    """What the parameters of each item are made of."""
    found = [dict(_features(item)) for item in items]
    values: dict[str, set[str]] = defaultdict(set)
    for row in found:
        for name, value in row.items():
            values[name].add(value)
    few = {name for name, of in values.items() if "." not in name or len(of) <= MOST_VALUES_OF_A_FEATURE}
    return [{name: value for name, value in row.items() if name in few} for row in found]


def _features(item: pytest.Item) -> Iterator[tuple[str, str]]:
    assert isinstance(item, pytest.Function)
    for name, value in item.callspec.params.items():
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield f"{name}.{field.name}", repr(getattr(value, field.name))
        else:
            yield name, repr(value)
