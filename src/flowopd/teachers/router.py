"""Every row of a batch to the teacher of its task."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flowopd.core.shown import Shown
from flowopd.records import Conditioning
from flowopd.teachers.base import Teacher
from flowopd.teachers.composed import ask


class Router(Shown):
    """Hard routing R(c): a prompt's task names its teacher.

    Args:
        teachers: teacher of each task.
        lockstep: ask every teacher at every call, if need be about a row whose answer is dropped. Sharded ranks wait
            for each other in every forward, so their number must not depend on how a rank's rows are routed.

    References:
        Flow-OPD (arXiv 2605.08063), hard routing.

    >>> import torch
    >>> class Constant(Shown):
    ...     def __init__(self, value: float) -> None:
    ...         self.value = value
    ...     def attach(self, backbone: object) -> None: ...
    ...     def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    ...         return torch.full_like(x, self.value)
    ...     def fingerprint(self) -> str:
    ...         return str(self.value)
    >>> x, cond = torch.zeros(3, 1, 1, 1), Conditioning(torch.zeros(3, 1, 1), torch.zeros(3, 1))
    >>> router = Router({"text": Constant(1.0), "counting": Constant(2.0)})
    >>> router.velocity(x, torch.ones(3), cond, tasks=["text", "counting", "text"]).flatten()
    tensor([1., 2., 1.])
    """

    def __init__(self, teachers: Mapping[str, Teacher], lockstep: bool = False) -> None:
        self.teachers = dict(teachers)
        self.lockstep = lockstep

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless every task has a teacher.

        Raises:
            ValueError: naming the tasks that have none.
        """
        if lost := sorted(set(tasks) - set(self.teachers)):
            raise ValueError(f"no teacher for task {', '.join(map(repr, lost))}; add a TeacherCallback for it")

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, tasks: Sequence[str], level: float | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W) of each row's own teacher; rows are grouped by teacher and put back in order."""
        return ask({"velocity": self.groups(tasks)}, x, sigma, cond, self.lockstep, level)["velocity"]

    def groups(self, tasks: Sequence[str]) -> list[tuple[Teacher, list[int]]]:
        """Every teacher, and the rows that are of its task.

        Raises:
            ValueError: naming the tasks that have none.
        """
        self.check(tasks)
        return [(teacher, [i for i, other in enumerate(tasks) if other == t]) for t, teacher in self.teachers.items()]
