"""OPDStudent: multi-teacher on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowopd.core.objectives import Objective, TransitionKL
from flowopd.models import Backbone
from flowopd.training.policy import FlowPolicy


class OPDStudent(FlowPolicy):
    """The student samples its own trajectories; each row learns from its task's teacher at every visited state.

    Wrap the objective in ``Anchored`` and add an ``AnchorCallback`` for MAR. No image is decoded and no reward is
    called while training.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on; default: ``TransitionKL``.
        options: what every ``FlowPolicy`` takes.

    References:
        Flow-OPD (arXiv 2605.08063); the default objective is DiffusionOPD's (arXiv 2605.15055).
    """

    def __init__(self, backbone: Backbone, objective: Objective | None = None, **options: Any) -> None:
        super().__init__(backbone, objective or TransitionKL(), **options)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless teachers alone provide what training on these tasks needs.

        Raises:
            ValueError: saying what is missing.
        """
        if "advantage" in self.needs():
            raise ValueError(
                "the objective needs advantages, but an OPDStudent calls no reward; train it as a flowopd.GRPOTeacher, "
                "which learns from rewards and from teachers"
            )
        super().check(tasks)
