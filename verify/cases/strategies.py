"""Hypothesis strategies that draw cases; an example shrinks towards the simplest option of each property."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from .case import Case
from .catalogue import draw_case

seeds = st.integers(min_value=0, max_value=2**31 - 1)
"""Seeds for make_inputs."""


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """Cases over shapes, masks, layouts, subsets of tangents and cotangents, magnitudes and kinds of numbers."""
    return draw_case(lambda options: draw(st.sampled_from(options)))
