"""Shares of tasks that follow how far each still is from its teacher."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from flowopd.core.ranges import above, within
from flowopd.core.shown import Shown

Distances = Mapping[str, Mapping[int, float]]
"""By task and step of the rollout, the mean squared distance of student's and teacher's velocities in an iteration."""


class GapAware(Shown):
    """More prompts for the task whose distance to its teacher has shrunk least.

        gap_t = mean_j d_tj / mean_j d_tj at the beginning,    n_t = least + (N - T · least) · gap_t / Σ_s gap_s

    d_tj is a running average of the squared distance of velocities of task t at step j, so that it does not matter
    which steps were drawn. Of N prompts each of the T tasks gets its ``least``, floor · N rounded up; the others go by
    the gap, in whole prompts (largest remainders). Tasks share alike as long as no distance is known.

    Args:
        floor: the smallest share of a task.
        decay: of the running averages, per iteration in which the step was trained; 0 for the last distance alone.
        absolute: gap_t = mean_j d_tj, for tasks whose distances compare, or a student that starts at one of its
            teachers.

    Raises:
        ValueError: if a number is out of range.

    References:
        Open-MOPD (arXiv 2608.19098), of language models.

    >>> mixed = GapAware(floor=0.1, decay=0.0)
    >>> mixed.counts(["counting", "text"], 24)
    {'counting': 12, 'text': 12}
    >>> mixed.learn({"counting": {0: 0.4, 5: 0.2}, "text": {0: 4.0, 5: 2.0}})
    >>> mixed.learn({"counting": {0: 0.4}, "text": {0: 1.0}})
    >>> mixed.gaps()
    {'counting': 1.0, 'text': 0.5}
    >>> mixed.counts(["counting", "text"], 24)
    {'counting': 15, 'text': 9}
    """

    def __init__(self, floor: float = 0.1, decay: float = 0.8, absolute: bool = False) -> None:
        above(0.0, floor=floor)
        within(0.0, 1.0, floor=floor, decay=decay)
        self.floor = floor
        self.decay = decay
        self.absolute = absolute
        self._first: dict[str, dict[int, float]] = {}
        self._now: dict[str, dict[int, float]] = {}

    def counts(self, tasks: Sequence[str], count: int) -> dict[str, int]:
        """How many of ``count`` prompts each task gets.

        Raises:
            ValueError: if they do not suffice for the smallest share of every task.
        """
        least = math.ceil(self.floor * count - 1e-9)  # 0.1 · 30 is 3
        if (rest := count - least * len(tasks)) < 0:
            raise ValueError(
                f"{count} prompts per iteration are too few for {len(tasks)} tasks of at least {least} each, which "
                f"ratio.floor {self.floor:g} asks for; choose more prompts, or a smaller floor"
            )
        return {task: least + more for task, more in _by_remainders(self._gaps(tasks), rest).items()}

    def gaps(self) -> dict[str, float]:
        """What is known of every task's gap."""
        return {task: self._gap(task) for task, steps in self._now.items() if steps}

    def learn(self, distances: Distances) -> None:
        """Take the distances of an iteration into the running averages; what is not finite is left out."""
        for task, steps in distances.items():
            first, now = self._first.setdefault(task, {}), self._now.setdefault(task, {})
            for step, distance in steps.items():
                if math.isfinite(distance):
                    first.setdefault(step, distance)
                    now[step] = self.decay * now.get(step, distance) + (1 - self.decay) * distance

    def state_dict(self) -> dict[str, Any]:
        """The running averages, and where they began."""
        return {"first": self._first, "now": self._now}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._first, self._now = (
            {task: dict(steps) for task, steps in state_dict[n].items()} for n in ("first", "now")
        )

    def _gap(self, task: str) -> float:
        now, first = fmean(self._now[task].values()), fmean(self._first[task].values())
        return now if self.absolute else now / max(first, 1e-12)

    def _gaps(self, tasks: Sequence[str]) -> dict[str, float]:
        """Of these tasks; alike as long as one of them is unknown, or none has any."""
        gaps = {task: self._gap(task) if self._now.get(task) else 0.0 for task in tasks}
        known = all(self._now.get(task) for task in tasks) and any(gaps.values())
        return gaps if known else dict.fromkeys(tasks, 1.0)


def _by_remainders(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers that sum to ``count`` in proportion to the weights; the first of equal remainders is rounded up."""
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    whole = {name: int(share) for name, share in exact.items()}
    up = sorted(exact, key=lambda name: whole[name] - exact[name])[: count - sum(whole.values())]
    return {name: number + (name in up) for name, number in whole.items()}
