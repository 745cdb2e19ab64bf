"""What one forward draws."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from flowopd.records import Prompt
from flowopd.rollouts.noise import RowNoise


@dataclass(frozen=True)
class Draw:
    """Prompts of the rows of one forward, their noise, and the steps of their trajectories that are trained on.

    Args:
        prompts: B prompts; siblings stand next to each other.
        noise: of B rows.
        trained: the trained steps, ascending, and what the loss of each counts among those of the rollout.
        unasked: which of the batches that it becomes the anchor is not asked about, by their number.
    """

    prompts: Sequence[Prompt]
    noise: RowNoise
    trained: Mapping[int, float]
    unasked: Collection[int] = ()

    def __getitem__(self, rows: slice) -> Draw:
        """Some of the rows, with the same noise as among all."""
        return replace(self, prompts=self.prompts[rows], noise=self.noise[rows])

    def needs(self, number: int, needs: frozenset[str]) -> frozenset[str]:
        """The labels that one of its batches needs, where training needs these."""
        return needs - {"anchor"} if number in self.unasked else needs

    @property
    def texts(self) -> list[str]:
        """What the text encoders read, B."""
        return [prompt.text for prompt in self.prompts]

    @property
    def tasks(self) -> list[str]:
        """Names of the rows' tasks, B."""
        return [prompt.task for prompt in self.prompts]
