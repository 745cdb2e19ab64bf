"""Which steps of a rollout are trained: all that may be, or a few that are drawn anew for every rollout.

The loss of a rollout is the mean of the losses L_j of its n trainable steps. Of K drawn steps, step j with probability
π_j, it is estimated without bias by

    1/n · Σ_{j drawn} L_j / π_j  =  1/K · Σ_{j drawn} w_j · L_j,      w_j = K / (n · π_j),

so that the expected gradient is that of all steps. Without these weights the mean loss of the drawn steps is another
objective, in which step j counts by n · π_j / K.
"""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from flowopd.core.ranges import above, at_least
from flowopd.core.shown import Shown


class Steps(Shown, ABC):
    """A rule that draws which of n trainable steps are trained.

    Args:
        count: K, steps of a rollout that are trained.
        weighted: weigh every drawn step by w_j (see above); otherwise all drawn steps count alike.
    """

    def __init__(self, count: int, weighted: bool) -> None:
        at_least(1, count=count)
        self.count = count
        self.weighted = weighted

    @abstractmethod
    def probabilities(self, sigmas: Tensor) -> Tensor:
        """Return π (n,), the probability that each of n steps between levels ``sigmas`` (n + 1,) is drawn; Σ π = K."""

    @abstractmethod
    def draw(self, sigmas: Tensor, generator: torch.Generator) -> list[int]:
        """Return K different steps out of n, in order."""

    def weights(self, sigmas: Tensor) -> Tensor:
        """Return w (n,), what the loss of each step counts when it is drawn."""
        chances = self.probabilities(sigmas)
        return self.count / (len(chances) * chances) if self.weighted else torch.ones_like(chances)

    def check(self, available: int) -> None:
        """Raise unless K steps can be drawn.

        Raises:
            ValueError: with both numbers.
        """
        if self.count > available:
            raise ValueError(
                f"{type(self).__name__} draws {self.count} steps, but only {available} may be trained; "
                f"choose a count of at most {available}"
            )


def some_of(count: int, share: float, generator: torch.Generator) -> list[int]:
    """Some of ``count`` steps in order, each with probability ``share``, as many as that says to within one.

    Systematic sampling: those in which u, u + 1, ... fall on a line where each is ``share`` long, u uniform in [0, 1).

    >>> some_of(8, 0.5, torch.Generator().manual_seed(0))
    [1, 3, 5, 7]
    """
    ends = torch.arange(count + 1, dtype=torch.float64) * share
    passed = (ends - torch.rand((), generator=generator, dtype=torch.float64)).ceil()
    return passed.diff().nonzero().flatten().tolist()


class SpreadSteps(Steps):
    """One step from each of K equal parts of the grid, each step of a part as likely as its neighbours.

    Where K divides n every weight is 1, weighted or not.

    Args:
        count: K, steps of a rollout that are trained.
        weighted: weigh steps so that the expected gradient is that of all steps.

    >>> grid = torch.linspace(1, 0, 9)
    >>> SpreadSteps(2).probabilities(grid)
    tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    >>> SpreadSteps(2).draw(grid, torch.Generator().manual_seed(0))
    [0, 7]
    """

    def __init__(self, count: int, weighted: bool = True) -> None:
        super().__init__(count, weighted)

    def probabilities(self, sigmas: Tensor) -> Tensor:
        """π_j = 1 / size of the part."""
        return torch.cat([torch.full((len(part),), 1 / len(part), dtype=torch.float64) for part in self._parts(sigmas)])

    def draw(self, sigmas: Tensor, generator: torch.Generator) -> list[int]:
        """One of each part."""
        return [part[int(torch.randint(len(part), (), generator=generator))] for part in self._parts(sigmas)]

    def _parts(self, sigmas: Tensor) -> list[range]:
        n = len(sigmas) - 1
        edges = [k * n // self.count for k in range(self.count + 1)]
        return [range(first, last) for first, last in pairwise(edges)]


class BetaSteps(Steps):
    """K steps by a density over noise levels,  σ ~ Beta(a, b).

    A step's mass is the density at its middle times its width; π_j = K · mass, but never more than 1 (what is over goes
    to the other steps in proportion). Drawn by one uniform number (systematic sampling), so no step is drawn twice.

    Args:
        count: K, steps of a rollout that are trained.
        a, b: of the Beta density over σ: a > b leans to noise, a < b to clean pictures.
        weighted: weigh steps so that the expected gradient is that of all steps.

    References:
        DanceOPD (arXiv 2606.27377), one state per rollout at 1 - σ ~ Beta(5, 2): ``BetaSteps(1, 2.0, 5.0)``.

    >>> BetaSteps(1, 2.0, 5.0).probabilities(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])).round(decimals=2)
    tensor([0.0000, 0.0900, 0.4000, 0.5100], dtype=torch.float64)
    """

    def __init__(self, count: int, a: float, b: float, weighted: bool = True) -> None:
        super().__init__(count, weighted)
        above(0.0, a=a, b=b)
        self.a = a
        self.b = b

    def probabilities(self, sigmas: Tensor) -> Tensor:
        """π_j = min(1, c · mass_j), with c such that Σ π = K."""
        sigmas = sigmas.double()
        middle, width = (sigmas[:-1] + sigmas[1:]) / 2, sigmas[:-1] - sigmas[1:]
        mass = middle ** (self.a - 1) * (1 - middle) ** (self.b - 1) * width
        sure = torch.zeros_like(mass, dtype=torch.bool)
        chances = self.count * mass / mass.sum()
        while bool((chances > 1).any()):
            sure |= chances >= 1
            rest = mass.where(~sure, 0.0)
            chances = ((self.count - sure.sum()) * rest / rest.sum()).where(~sure, 1.0)
        return chances

    def draw(self, sigmas: Tensor, generator: torch.Generator) -> list[int]:
        """The steps in which u, u + 1, …, u + K - 1 fall on the line of their probabilities, u uniform in [0, 1)."""
        ends = self.probabilities(sigmas).cumsum(0)
        points = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(self.count)
        return torch.searchsorted(ends, points, right=True).clamp(max=len(ends) - 1).tolist()
