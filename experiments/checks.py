"""Checks that several sections of a config share."""

import math
from typing import Any


def at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Raises `ValueError` for a number that is smaller, or not finite; null is left to mean what it means."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"`{section}.{name}` must be at least {least}, got {value}.")
