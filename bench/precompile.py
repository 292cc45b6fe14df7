"""What a sweep compiles, side by side, before it measures: one after the other, that would take most of its time."""

from collections.abc import Sequence
from dataclasses import replace

from .cases import reduced
from .options import Cell
from .providers import PROVIDERS


def parts(cells: Sequence[Cell], device: str, count: int) -> list[list[Cell]]:
    """What those providers will be called with that compile, as up to `count` lists to run at the same time.

    The shapes of the gate are among them. Those of one length share a list: a provider may tune itself for each.
    """
    units: dict[tuple[object, ...], dict[Cell, None]] = {}
    for cell in cells:
        provider, case = PROVIDERS[cell.provider], cell.case
        if not provider.compiles or provider.why_not(case, device):
            continue
        for called in (reduced(case, provider.gate_length(case, device)), case):
            key = (cell.provider, called.head_dim, called.dtype, called.queries)
            units.setdefault(key, {})[replace(cell, case=called)] = None
    lists = [[cell for unit in list(units.values())[i::count] for cell in unit] for i in range(count)]
    return [part for part in lists if part]
