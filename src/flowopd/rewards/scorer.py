"""A reward in a run: which tasks it scores, what it weighs, and what is known where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from flowopd.core.ranges import finite
from flowopd.core.tensors import picks
from flowopd.records import Prompt
from flowopd.rewards.base import Reward, Scores, detailed
from flowopd.rewards.executor import Executor


@dataclass(frozen=True)
class Column:
    """Scores of B images.

    Args:
        values: (B,), NaN where scoring failed.
        asked: (B,) bool, rows that were to be scored.
    """

    values: Tensor
    asked: Tensor


class Scorer:
    """A reward for some tasks or all: NaN where it was not asked, and where it failed.

    Args:
        name: what the scores are called in logs and tables.
        reward: the reward.
        tasks: names of the tasks that it scores; default: all.
        weight: its share in the training reward; 0 only evaluates.
        in_average: count it in a table's average.
        background: score finished pictures in a thread of its own, on the CPU, while the caller goes on (``begin``).
        columns: parts of its scores that are columns of an evaluation too, as ``<name>/<part>``.
        macro: its own column is the mean of these columns' means, so that each counts alike.

    Raises:
        ValueError: if the weight is not finite, ``tasks`` is empty, or ``macro`` is without ``columns``.

    >>> class Redness:
    ...     def score(self, images, prompts):
    ...         return images[:, 0].mean((1, 2))
    >>> images, prompts = torch.ones(2, 3, 4, 4), [Prompt("a rose", "red"), Prompt("grass", "green")]
    >>> Scorer("red", Redness(), tasks=["red"]).score(images, prompts)
    tensor([1., nan])
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        tasks: Sequence[str] | None = None,
        weight: float = 1.0,
        in_average: bool = True,
        background: bool = False,
        columns: Sequence[str] = (),
        macro: bool = False,
    ) -> None:
        finite(**{f"the weight of reward {name!r}": weight})
        if tasks is not None and not tasks:
            raise ValueError(f"reward {name!r} scores no task; name some in `tasks`, or leave it out to score all")
        if macro and not columns:
            raise ValueError(f"reward {name!r} is a macro mean of no columns; name the parts in `columns`")
        self.name = name
        self.reward = reward
        self.tasks = None if tasks is None else list(tasks)
        self.weight = weight
        self.in_average = in_average
        self.background = background
        self.columns = list(columns)
        self.macro = macro
        self._executor = Executor(self.detail)

    def covers(self, task: str) -> bool:
        """Whether the task is scored by this reward."""
        return self.tasks is None or task in self.tasks

    def asked(self, prompts: Sequence[Prompt]) -> Tensor:
        """Whether each prompt is scored by this reward, (B,) bool."""
        return torch.tensor([self.covers(prompt.task) for prompt in prompts], dtype=torch.bool)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W); NaN for prompts of other tasks, and where scoring failed."""
        return self.detail(images, prompts).value

    @torch.no_grad()
    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images (B, 3, H, W) with their parts; NaN for prompts of other tasks, and where scoring failed.

        Raises:
            ValueError: if the reward does not give one score per image.
        """
        numbers = [number for number, prompt in enumerate(prompts) if self.covers(prompt.task)]
        if not numbers:
            return Scores(torch.full((len(prompts),), torch.nan, device=images.device))
        rows, asked = picks(numbers, images.device), [prompts[number] for number in numbers]
        with torch.autocast(images.device.type, enabled=False):  # a score is the same in whatever precision we train
            found = detailed(self.reward, images[rows], asked)
        parts = {name: self._scattered(part, rows, len(prompts)) for name, part in found.parts.items()}
        return Scores(self._scattered(found.value, rows, len(prompts)), parts)

    def _scattered(self, values: Tensor, rows: Tensor | slice, count: int) -> Tensor:
        """Scores of some rows as scores of all; what is not a finite number is a failure, NaN."""
        scores = torch.full((count,), torch.nan, device=values.device)
        scores[rows] = values.to(scores).where(values.to(scores).isfinite(), torch.nan)
        return scores

    def begin(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[Scores]:
        """Score images (B, 3, H, W) as ``detail`` does: in the background, or if it is not of that kind at once."""
        if self.background:
            return self._executor.submit(images, prompts)
        done = Future[Scores]()
        done.set_result(self.detail(images, prompts))
        return done

    def close(self) -> None:
        """End the thread: nobody waits for its scores any more."""
        self._executor.close()

    def evaluate(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Column]:
        """Columns of an evaluation of images (B, 3, H, W): the scores, and the parts that were asked for."""
        scores, asked = self.detail(images, prompts), self.asked(prompts).to(images.device)
        nothing = torch.full_like(scores.value, torch.nan)
        parts = {f"{self.name}/{name}": scores.parts.get(name, nothing) for name in self.columns}
        return {self.name: Column(scores.value, asked)} | {k: Column(v, ~v.isnan()) for k, v in parts.items()}

    def column_names(self) -> list[str]:
        """What ``evaluate`` calls its columns."""
        return [self.name, *(f"{self.name}/{part}" for part in self.columns)]
