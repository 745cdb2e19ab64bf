"""Where prompts come from."""

import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from flowopd.core.ranges import at_least
from flowopd.records import Prompt


@runtime_checkable
class PromptSource(Protocol):
    """An endless, seeded stream of prompts of one task."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts; the same seed gives the same prompts."""
        ...


def shuffled_passes(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Return ``count`` prompts in shuffled passes over ``prompts``: none comes again before all have come."""
    at_least(0, count=count, seed=seed)
    shuffler = random.Random(seed)
    drawn: list[Prompt] = []
    while len(drawn) < count:
        drawn += shuffler.sample(prompts, min(len(prompts), count - len(drawn)))
    return drawn
