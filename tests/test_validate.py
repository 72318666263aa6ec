"""Checks of single arguments: what each takes, and that its message has name and value."""

import math

import numpy as np
import pytest

from opacus_ac._validate import at_most, count, fraction, not_negative, one_of, positive

NO_NUMBERS = [None, "1", True, math.nan, math.inf, -math.inf]
CASES = {
    "positive": (positive, [1, 0.5, np.float64(2.0), np.float32(1.0), np.int64(3)], [0, -1, *NO_NUMBERS]),
    "not negative": (not_negative, [0, 0.0, 3], [-1e-9, *NO_NUMBERS]),
    "fraction": (fraction, [0.5, 1e-9], [0, 1, 1.5, *NO_NUMBERS]),
    "at most 2": (lambda **named: at_most(2.0, **named), [2, 0.1], [0, 2.1, *NO_NUMBERS]),
    "0 to 2": (lambda **named: at_most(2.0, 0.0, True, **named), [0, 2], [-0.1, 2.1, *NO_NUMBERS]),
    "count": (count, [1, 7, np.int64(3)], [0, -1, 1.0, *NO_NUMBERS]),
    "one of": (lambda **named: one_of(("a", None), **named), ["a", None], ["b", 1, True]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, good, _) in CASES.items() for value in good])
def test_what_is_in_range_is_returned(name, value):
    assert CASES[name][0](thing=value) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (*_, bad) in CASES.items() for value in bad])
def test_what_is_not_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match="thing") as raised:
        CASES[name][0](thing=value)
    assert repr(value) in str(raised.value)


def test_a_check_is_of_one_value():
    with pytest.raises(ValueError, match="unpack"):
        positive(a=1, b=2)
