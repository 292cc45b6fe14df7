"""Settings are finite numbers: checked where a dataclass of settings is made."""

import dataclasses
import math
from typing import Any


def require_finite(settings: Any, prefix: str = "") -> None:
    """Raises ValueError("name: expected a finite number, got ...") for inf or NaN in a field of a dataclass.

    `prefix` comes before the name where other messages about these settings have it, too.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{field.name}: expected a finite number, got {value!r}")
