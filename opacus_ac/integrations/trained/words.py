"""The privacy of a run in words that need no background. Needs neither torch nor opacus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

_LARGEST_FACTOR = 1e6


def number(epsilon: float | str) -> str:
    """Return an epsilon with as many digits as a reader can use. It is rounded up, so that it still holds.

    >>> number(7.99837), number(8.001), number(0.01234), number("infinity")
    ('8.00', '8.01', '0.0124', 'infinite')
    """
    if isinstance(epsilon, str) or math.isinf(epsilon):
        return "infinite"
    if epsilon >= 0.1:
        return str(Decimal(epsilon).quantize(Decimal("0.01"), ROUND_CEILING))
    return f"{Context(prec=3, rounding=ROUND_CEILING).create_decimal(epsilon):g}"


def in_words(report: Mapping[str, Any], target: float | None = None) -> str:
    """Return what a privacy report claims.

    Args:
        report: the privacy report as plain values.
        target: epsilon that the run may spend, if it has a target.
    """
    epsilon, delta = report["epsilon"], report["delta"]
    if isinstance(epsilon, str) or math.isinf(epsilon):
        return "This run is NOT private: no finite epsilon holds for it."
    unit = str(report.get("unit", "one record"))
    aim = "" if target is None else f", of a target of {target:g}"
    factor = math.exp(min(epsilon, 700.0))
    odds = f"{factor:,.0f}" if factor >= 10 else f"{factor:.3g}"
    meaning = (
        f"Whoever sees everything that was released can tell whether {unit} was in the data with odds that have moved "
        f"by at most a factor of e^epsilon = {odds}"
        if factor <= _LARGEST_FACTOR
        else f"At such an epsilon the bound for {unit} says next to nothing"
    )
    return (
        f"The run has spent epsilon = {number(epsilon)} at delta = {delta:g}{aim}. {meaning}, but for events of "
        f"probability delta."
    )
