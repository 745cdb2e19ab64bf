"""The laws of ranges: a number outside is one sentence with its name, and what is no number is outside."""

import math
from typing import Literal

import pytest

from flowopd.core.ranges import above, at_least, one_of, within

NOT_NUMBERS = [math.nan, math.inf, True, "8", [8], 1 + 0j]


@pytest.mark.parametrize("value", [0, -1, 2.5, *NOT_NUMBERS])
def test_a_whole_bound_takes_whole_numbers_alone(value):
    for check in (lambda: at_least(1, size=value), lambda: above(0, size=value), lambda: within(1, 8, size=value)):
        with pytest.raises(ValueError, match=r"^size is .*; expected "):
            check()
    at_least(1, size=1)
    above(0, size=1)
    within(1, 8, size=8)


@pytest.mark.parametrize("value", [-0.1, *NOT_NUMBERS])
def test_a_decimal_bound_takes_any_number(value):
    for check in (lambda: at_least(0.0, r=value), lambda: above(0.0, r=value), lambda: within(0.0, 1.0, r=value)):
        with pytest.raises(ValueError, match=r"^r is .*; expected "):
            check()
    at_least(0.0, r=0)
    above(0.0, r=0.5)
    within(0.0, 1.0, r=1)


def test_bounds_belong_to_the_range_except_above():
    at_least(2, n=2)
    within(2, 3, n=2, m=3)
    with pytest.raises(ValueError, match="m is 2; expected a whole number above 2"):
        above(2, n=3, m=2)


def test_a_choice_is_one_of_those_there_are():
    one_of(Literal["a", "b"], letter="a", other="b", none=None)
    for value in ("c", "", "A", 1):
        with pytest.raises(ValueError, match=f"^letter is {value!r}; expected one of a, b$"):
            one_of(Literal["a", "b"], letter=value)


def test_nothing_given_is_in_every_range():
    at_least(1, n=None)
    above(0.0, n=None)
    within(0, 1, n=None)
