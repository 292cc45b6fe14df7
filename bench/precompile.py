"""What a sweep compiles, side by side, before it measures: one after the other, that would take most of its time."""

from collections.abc import Sequence
from dataclasses import replace

from .cases import reduced
from .options import Cell
from .providers import PROVIDERS


def parts(cells: Sequence[Cell], device: str, count: int) -> list[list[Cell]]:
    """What those providers will be called with that compile, as up to `count` lists to run at the same time.

    The shapes of the gate and of host times are among them, and are all where the gate knows from which lengths on
    there are other kernels; any other provider may tune itself for each length. Calls that have kernels in common share
    a list, so that each is compiled once.
    """
    units: dict[tuple[object, ...], dict[Cell, None]] = {}
    for cell in cells:
        provider, case = PROVIDERS[cell.provider], cell.case
        if not provider.compiles or provider.why_not(case, device):
            continue
        shapes = [reduced(case), reduced(case, provider.gate_length(case, device))]
        if not provider.other_kernels_from:
            shapes.append(case)
        for called in shapes:
            length = 0 if provider.other_kernels_from else called.queries
            group = case.heads // case.kv_heads
            kernels = (case.head_dim, case.width, case.dtype, case.mask, case.causal, group, case.plain, length)
            units.setdefault((cell.provider, *kernels), {})[replace(cell, case=called)] = None
    lists = [[cell for unit in list(units.values())[i::count] for cell in unit] for i in range(count)]
    return [part for part in lists if part]
