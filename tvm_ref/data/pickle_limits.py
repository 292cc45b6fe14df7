"""Checks an untrusted pickle before it is loaded: it must stay within limits of operations, nesting and sharing.

A short pickle can describe a tuple of tuples with 2^100 leaves, by naming each level twice. It loads at once, but
hashing or walking it never ends. And one operation can ask for a table of 2^31 places. So the operations are read
first, without making any object, and the size and depth of what each would make are added up.
"""

import pickletools
from typing import BinaryIO, NamedTuple

MOST_OPERATIONS = 1_000_000  # in a pickle; published weights have about 60 thousand
MOST_NESTING = 500  # containers within containers
MOST_VISITS = 50_000_000  # objects that all operations together take, each counted as often as it is contained

GETS = {"GET", "BINGET", "LONG_BINGET"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # they change the object below their items


class PickleLimitError(ValueError):
    """A pickle goes beyond a limit, or its operations make no sense."""


class _Size(NamedTuple):
    objects: int
    nesting: int


def check_pickle(stream: BinaryIO) -> None:
    """Reads one pickle from `stream` up to its end. Raises PickleLimitError if it goes beyond a limit.

    What pickletools raises for a damaged pickle goes out as it is: ValueError, LookupError and the like.
    """
    stack: list[_Size | None] = []  # None is a mark
    memo: dict[int, _Size | None] = {}
    visits = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MOST_OPERATIONS:
            raise PickleLimitError(f"pickle: expected at most {MOST_OPERATIONS} operations, got more")
        name = operation.name
        if name in GETS:
            stack.append(memo[int(argument or 0)])
        elif name in PUTS:
            place = len(memo) if argument is None else argument
            if not 0 <= place < MOST_OPERATIONS:
                raise PickleLimitError(f"pickle: expected at most {MOST_OPERATIONS} places, got number {place}")
            memo[place] = stack[-1]
        elif name == "MARK":
            stack.append(None)
        else:
            taken = _take(stack, operation)
            made = _made(name, taken)
            visits += 1 + sum(size.objects for size in (taken[1:] if name in GROWING else taken))
            if made.nesting > MOST_NESTING:
                raise PickleLimitError(f"pickle: expected at most {MOST_NESTING} containers in each other, got more")
            if visits > MOST_VISITS:
                raise PickleLimitError(f"pickle: expected at most {MOST_VISITS} objects within others, got more")
            stack += [made] * len(operation.stack_after)


def _take(stack: list[_Size | None], operation: pickletools.OpcodeInfo) -> list[_Size]:
    """Takes from the stack what an operation does, in the order in which it lies there."""
    before = operation.stack_before
    taken: list[_Size] = []
    number = len(before)
    if pickletools.markobject in before or (operation.name == "POP" and stack and stack[-1] is None):
        while (size := stack.pop()) is not None:
            taken.append(size)
        number = before.index(pickletools.markobject) if pickletools.markobject in before else 0
    for _ in range(number):
        if (size := stack.pop()) is None:
            raise PickleLimitError("pickle: expected an object, got a mark")
        taken.append(size)
    return taken[::-1]


def _made(name: str, taken: list[_Size]) -> _Size:
    """The size of what an operation makes. A container that grows gets no deeper by being taken again."""
    objects = sum(size.objects for size in taken)
    if name in GROWING and taken:
        return _Size(objects, max(taken[0].nesting, 1 + max((size.nesting for size in taken[1:]), default=0)))
    return _Size(1 + objects, 1 + max((size.nesting for size in taken), default=0))
