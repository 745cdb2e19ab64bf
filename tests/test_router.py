"""The laws of routing: every row to its own teacher; where ranks wait for each other, every teacher in every call."""

import pytest
import torch

from flowopd.records import Conditioning
from flowopd.teachers import Router


class Times:
    """A teacher whose velocity is a multiple of the state; counts what it is asked."""

    def __init__(self, factor: float):
        self.factor = factor
        self.rows: list[int] = []

    def velocity(self, x, sigma, cond):
        self.rows.append(len(x))
        return self.factor * x


ROUTES = {"all": "rgbr", "one": "gggg", "two": "rggr", "single row": "b"}


def route(tasks: str, lockstep: bool):
    teachers = {task: Times(factor) for task, factor in zip("rgb", (2.0, 3.0, 5.0), strict=True)}
    rows = len(tasks)
    cond = Conditioning(torch.zeros(rows, 1, 1), torch.zeros(rows, 1))
    x = torch.arange(1.0, rows + 1)[:, None, None, None]
    velocity = Router(teachers, lockstep).velocity(x, torch.ones(rows), cond, list(tasks))
    factors = torch.tensor([teachers[task].factor for task in tasks])[:, None, None, None]
    torch.testing.assert_close(velocity, factors * x, rtol=0, atol=0)
    return {task: teacher.rows for task, teacher in teachers.items()}


@pytest.mark.parametrize("tasks", ROUTES.values(), ids=ROUTES)
def test_every_row_finds_its_teacher_and_no_other_is_asked(tasks):
    assert route(tasks, lockstep=False) == {task: [tasks.count(task)] if task in tasks else [] for task in "rgb"}


@pytest.mark.parametrize("tasks", ROUTES.values(), ids=ROUTES)
def test_lockstep_every_teacher_is_asked_once_if_need_be_in_vain(tasks):
    assert route(tasks, lockstep=True) == {task: [max(1, tasks.count(task))] for task in "rgb"}


def test_a_teacher_of_two_tasks_is_asked_once():
    teacher = Times(2.0)
    cond = Conditioning(torch.zeros(3, 1, 1), torch.zeros(3, 1))
    router = Router({"r": teacher, "g": teacher, "b": Times(3.0)}, lockstep=True)
    router.velocity(torch.ones(3, 1, 1, 1), torch.ones(3), cond, ["r", "g", "r"])
    assert teacher.rows == [3]
