"""Numbers and choices are checked where they are given, each in one sentence."""

from math import inf
from numbers import Integral, Real
from typing import Any, get_args


def at_least(minimum: float, /, **values: float | None) -> None:
    """Raise unless every value is ``minimum`` or more; ``None`` is skipped.

    An ``int`` as the bound (1) asks for whole numbers, a ``float`` (1.0) for any. NaN, infinity and ``True`` are no
    numbers here.

    Raises:
        ValueError: naming the first value outside.

    >>> at_least(1, batch_size=8, count=None)
    >>> at_least(1, batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size is 0; expected at least 1
    >>> at_least(1, batch_size=2.5)
    Traceback (most recent call last):
    ValueError: batch_size is 2.5; expected a whole number of at least 1
    """
    for name, value in values.items():
        if value is not None and not (_number(value, minimum) and value >= minimum):
            kind = "" if _number(value, minimum) else f"{_kind(minimum)} of "
            raise ValueError(f"{name} is {value!r}; expected {kind}at least {minimum}")


def above(minimum: float, /, **values: float | None) -> None:
    """Raise unless every value is more than ``minimum``; otherwise as ``at_least``.

    Raises:
        ValueError: naming the first value outside.

    >>> above(0.0, timeout=0.0)
    Traceback (most recent call last):
    ValueError: timeout is 0.0; expected a number above 0.0
    """
    for name, value in values.items():
        if value is not None and not (_number(value, minimum) and value > minimum):
            raise ValueError(f"{name} is {value!r}; expected {_kind(minimum)} above {minimum}")


def within(low: float, high: float, /, **values: float | None) -> None:
    """Raise unless every value is from ``low`` to ``high``, both included; otherwise as ``at_least``.

    Raises:
        ValueError: naming the first value outside.

    >>> within(0.0, 1.0, decay=0.9)
    >>> within(0.0, 1.0, decay=float("nan"))
    Traceback (most recent call last):
    ValueError: decay is nan; expected a number from 0.0 to 1.0
    """
    for name, value in values.items():
        if value is not None and not (_number(value, low) and low <= value <= high):
            raise ValueError(f"{name} is {value!r}; expected {_kind(low)} from {low} to {high}")


def finite(**values: float | None) -> None:
    """Raise unless every value is a number, of any size and sign; otherwise as ``at_least``.

    Raises:
        ValueError: naming the first value that is none.

    >>> finite(weight=-1.0)
    >>> finite(weight=float("inf"))
    Traceback (most recent call last):
    ValueError: weight is inf; expected a finite number
    """
    for name, value in values.items():
        if value is not None and not _number(value, 0.0):
            raise ValueError(f"{name} is {value!r}; expected a finite number")


def one_of(choices: Any, **values: str | None) -> None:  # noqa: ANN401 - a Literal has no type of its own
    """Raise unless every value is one of a ``Literal``; ``None`` is skipped.

    Raises:
        ValueError: naming the first value that is none.

    >>> from typing import Literal
    >>> one_of(Literal["nan", "raise"], on_failure="ignore")
    Traceback (most recent call last):
    ValueError: on_failure is 'ignore'; expected one of nan, raise
    """
    for name, value in values.items():
        if value is not None and value not in get_args(choices):
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(choices))}")


def _number(value: Any, bound: float) -> bool:  # noqa: ANN401
    """Is this a finite number of the bound's kind?"""
    kind: Any = Integral if isinstance(bound, int) else Real
    return isinstance(value, kind) and not isinstance(value, bool) and bool(-inf < value < inf)


def _kind(bound: float) -> str:
    return "a whole number" if isinstance(bound, int) else "a number"
