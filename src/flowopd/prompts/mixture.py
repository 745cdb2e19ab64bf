"""Several tasks in one run."""

from collections.abc import Mapping

from flowopd.core.names import perhaps
from flowopd.core.ranges import at_least
from flowopd.prompts.base import PromptSource
from flowopd.prompts.gaps import GapAware
from flowopd.records import Prompt


class Mixture:
    """Prompts of several tasks, in every iteration or in turns.

    >>> from flowopd.prompts import OCRPrompts
    >>> mixture = Mixture({task: OCRPrompts(task=task) for task in ("sign", "poster")}, ratio={"sign": 1, "poster": 2})
    >>> [prompt.task for prompt in mixture.draw(6, iteration=0, seed=0)]
    ['sign', 'sign', 'poster', 'poster', 'poster', 'poster']

    Args:
        sources: prompts of each task.
        ratio: shares of the tasks, or a rule by which they follow each task's gap; default: equal.
        alternate: give whole iterations to one task at a time, in a cycle with these shares.

    Raises:
        ValueError: if there is no task, the shares name other tasks than the sources, or are out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, PromptSource],
        ratio: Mapping[str, int] | GapAware | None = None,
        alternate: bool = False,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs the prompts of at least one task, got none")
        self.sources = dict(sources)
        self.by_gap = ratio if isinstance(ratio, GapAware) else None
        self.ratio = dict.fromkeys(sources, 1) if isinstance(ratio, GapAware) or not ratio else dict(ratio)
        self.alternate = alternate
        if alternate and self.by_gap:
            raise ValueError("alternate gives whole iterations to tasks by fixed shares; leave it out beside GapAware")
        known = ", ".join(sorted(self.sources))
        if strange := sorted(set(self.ratio) - set(self.sources), key=str):
            meant = perhaps(strange[0], self.sources)
            raise ValueError(f"ratio names task {strange[0]!r}{meant}, the prompts are of {known}")
        if missing := sorted(set(self.sources) - set(self.ratio)):
            raise ValueError(f"ratio says nothing of task {missing[0]!r}, the prompts are of {known}; 0 is none of it")
        at_least(0, **{f"share of {task}": share for task, share in self.ratio.items()})
        if not any(self.ratio.values()):
            raise ValueError(f"one share at least must be above 0, got {self.ratio}")

    def counts(self, count: int, iteration: int) -> dict[str, int]:
        """How many prompts each task gets in an iteration.

        Raises:
            ValueError: if the shares do not divide the prompts, or a number is out of range.
        """
        at_least(1, count=count)
        at_least(0, iteration=iteration)
        if self.by_gap:
            return self.by_gap.counts(list(self.sources), count)
        cycle = [task for task, share in self.ratio.items() for _ in range(share)]
        if self.alternate:
            return {cycle[iteration % len(cycle)]: count}
        if count % len(cycle):
            raise ValueError(f"{count} prompts per iteration do not divide into shares {self.ratio}")
        return {task: count // len(cycle) * share for task, share in self.ratio.items()}

    def dealt(self, count: int, iteration: int) -> list[int]:
        """The order in which the prompts of ``draw`` are dealt out: each task spread evenly over all of it.

        Cut into n equal parts, it gives each the same number of every task, wherever n divides these numbers.

        >>> from flowopd.prompts import OCRPrompts
        >>> Mixture({task: OCRPrompts(task=task) for task in ("sign", "poster")}, {"sign": 1, "poster": 2}).dealt(6, 0)
        [2, 0, 3, 4, 1, 5]
        """
        places = [(2 * k + 1) / n for n in self.counts(count, iteration).values() for k in range(n)]
        return sorted(range(count), key=lambda index: (places[index], index))

    def draw(self, count: int, iteration: int, seed: int) -> list[Prompt]:
        """Prompts of one iteration, task after task; they depend on ``iteration``, ``seed`` and the counts alone."""
        counts = self.counts(count, iteration).items()
        return [prompt for task, n in counts for prompt in self.sources[task].draw(n, seed * 1_000_003 + iteration)]
