"""Several tasks in one run."""

from collections.abc import Mapping

from flowopd.prompts.base import PromptSource
from flowopd.records import Prompt


class Mixture:
    """Prompts of several tasks, in every iteration or in turns.

    Args:
        sources: prompts of each task.
        ratio: shares of the tasks; default: equal.
        alternate: give whole iterations to one task at a time, in a cycle with these shares.

    Raises:
        ValueError: if there is no task, or the shares name other tasks than the sources.
    """

    def __init__(
        self, sources: Mapping[str, PromptSource], ratio: Mapping[str, int] | None = None, alternate: bool = False
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs the prompts of at least one task, got none")
        self.sources = dict(sources)
        self.ratio = dict(ratio or dict.fromkeys(sources, 1))
        self.alternate = alternate
        if set(self.ratio) != set(self.sources):
            raise ValueError(f"ratio names tasks {sorted(self.ratio)}, the prompts are of {sorted(self.sources)}")

    def counts(self, count: int, iteration: int) -> dict[str, int]:
        """How many prompts each task gets in an iteration.

        Raises:
            ValueError: if the shares do not divide the prompts.
        """
        cycle = [task for task, share in self.ratio.items() for _ in range(share)]
        if self.alternate:
            return {cycle[iteration % len(cycle)]: count}
        if count % len(cycle):
            raise ValueError(f"{count} prompts per iteration do not divide into shares {self.ratio}")
        return {task: count // len(cycle) * share for task, share in self.ratio.items()}

    def draw(self, count: int, iteration: int, seed: int) -> list[Prompt]:
        """Prompts of one iteration; they depend on ``iteration`` and ``seed`` alone."""
        counts = self.counts(count, iteration).items()
        return [prompt for task, n in counts for prompt in self.sources[task].draw(n, seed * 1_000_003 + iteration)]
