"""Numbers that change along training."""

from typing import Protocol, runtime_checkable

from flowopd.core.ranges import at_least
from flowopd.core.shown import Shown


@runtime_checkable
class Course(Protocol):
    """A number for every iteration, of which it is a function alone; anything with this method is one.

    >>> class Halving:
    ...     def at(self, iteration: int) -> float:
    ...         return 0.5 ** (iteration // 100)
    >>> isinstance(Halving(), Course)
    True
    """

    def at(self, iteration: int) -> float:
        """Return the number in an iteration, of which the first is 0."""
        ...


class Ramp(Shown):
    """From one number to another in equal steps, and constant from there on,  start + (end - start) · min(i / n, 1).

    Args:
        start: in the first iteration.
        end: from iteration n on.
        iterations: n.

    >>> [Ramp(4.0, 1.0, iterations=3).at(iteration) for iteration in range(5)]
    [4.0, 3.0, 2.0, 1.0, 1.0]
    """

    def __init__(self, start: float, end: float, iterations: int) -> None:
        at_least(0.0, start=start, end=end)
        at_least(1, iterations=iterations)
        self.start = start
        self.end = end
        self.iterations = iterations

    def at(self, iteration: int) -> float:
        """Return the number in an iteration, of which the first is 0."""
        return self.start + (self.end - self.start) * min(iteration / self.iterations, 1)
