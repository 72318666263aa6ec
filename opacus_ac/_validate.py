"""Checks of single arguments, with one way of saying what is wrong.

Each takes the value by the name that the message shall give it, and returns it: ``self.rate = fraction(rate=rate)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def positive(**named: Any) -> float:
    """Return the value.

    Raises:
        ValueError: If it is not a finite number above 0.
    """
    name, value = _single(named)
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def not_negative(**named: Any) -> float:
    """Return the value.

    Raises:
        ValueError: If it is not a finite number of at least 0.
    """
    name, value = _single(named)
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def fraction(**named: Any) -> float:
    """Return the value.

    Raises:
        ValueError: If it is not a number between 0 and 1, both excluded.
    """
    name, value = _single(named)
    if not (_is_finite(value) and 0 < value < 1):
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return float(value)


def at_most(high: float, low: float = 0.0, low_included: bool = False, /, **named: Any) -> float:
    """Return the value.

    Raises:
        ValueError: If it is not a finite number between ``low`` and ``high``.
    """
    name, value = _single(named)
    if not (_is_finite(value) and (low <= value if low_included else low < value) and value <= high):
        sign = ">=" if low_included else ">"
        raise ValueError(f"{name}={value!r} must be a number {sign} {low:g} and <= {high:g}")
    return float(value)


def count(**named: Any) -> int:
    """Return the value.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    name, value = _single(named)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number >= 1")
    return int(value)


def one_of(choices: Iterable[Any], /, **named: Any) -> Any:
    """Return the value.

    Raises:
        ValueError: If it is none of ``choices``.
    """
    name, value = _single(named)
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not available: choose one of {', '.join(map(repr, choices))}")
    return value


def _single(named: dict[str, Any]) -> tuple[str, Any]:
    ((name, value),) = named.items()
    return name, value


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
