"""Every row of a batch to the teacher of its task."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowopd.records import Conditioning
from flowopd.teachers.base import Teacher


class Router:
    """Hard routing R(c): a prompt's task names its teacher.

    Args:
        teachers: teacher of each task.

    References:
        Flow-OPD (arXiv 2605.08063), hard routing.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless every task has a teacher.

        Raises:
            ValueError: naming the tasks that have none.
        """
        if lost := sorted(set(tasks) - set(self.teachers)):
            raise ValueError(f"no teacher for task {', '.join(map(repr, lost))}; add a TeacherCallback for it")

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, tasks: Sequence[str]) -> Tensor:
        """Velocity (B, C, H, W) of each row's own teacher; rows are grouped by teacher and put back in order."""
        self.check(tasks)
        groups = self._groups(tasks)
        if len(groups) == 1:
            return groups[0][0].velocity(x, sigma, cond)
        velocity = torch.empty_like(x)
        for teacher, rows in groups:
            velocity[rows] = teacher.velocity(x[rows], sigma[rows], cond[rows])
        return velocity

    def _groups(self, tasks: Sequence[str]) -> list[tuple[Teacher, list[int]]]:
        rows: dict[int, tuple[Teacher, list[int]]] = {}
        for row, task in enumerate(tasks):
            teacher = self.teachers[task]
            rows.setdefault(id(teacher), (teacher, []))[1].append(row)
        return list(rows.values())
