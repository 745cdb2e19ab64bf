"""Callbacks that carry rewards, teachers and the anchor into a run, and what they are together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flowopd.core.names import perhaps, refuse_duplicates
from flowopd.core.objectives import BRANCHES
from flowopd.rewards import Reward
from flowopd.rewards.judging import Judging
from flowopd.rewards.scorer import Scorer
from flowopd.teachers import Teacher
from flowopd.teachers.composed import at_guidance
from flowopd.teachers.teaching import Role, Teaching


class RewardCallback(Callback):
    """A reward for some tasks or all: trains a ``GRPOTeacher``, and is a column of every evaluation.

    Args:
        name: what the scores are called in logs and tables.
        reward: the reward.
        tasks: names of the tasks that it scores; default: all.
        weight: its share in the training reward, Σ weight · score over the rewards of a task; 0 only evaluates.
        in_average: count it in the table's average.
        background: while training, score a batch of finished pictures on the CPU, in a thread of its own, as the next
            batch is sampled; for rewards that compute on the CPU or wait for a server.
        columns: parts of its scores that are columns of every evaluation too, as ``<name>/<part>``.
        macro: its own column is the mean of these columns' means, so that each counts alike, however many prompts it
            has: GenEval's number over its six tags.

    Raises:
        ValueError: if the weight is not finite, ``tasks`` is empty, or ``macro`` is without ``columns``.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        tasks: list[str] | None = None,
        weight: float = 1.0,
        in_average: bool = True,
        background: bool = False,
        columns: list[str] | None = None,
        macro: bool = False,
    ) -> None:
        self.scorer = Scorer(name, reward, tasks, weight, in_average, background, columns or (), macro)

    @property
    @override
    def state_key(self) -> str:
        return f"RewardCallback/{self.scorer.name}"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.scorer.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.scorer.close()


class _CarriesTeacher(Callback):
    """A teacher in the trainer; refuses to go on from a checkpoint that was taught by another one."""

    role: Role

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        return self.role.teacher

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.teacher.fingerprint()}  # the weights stay out of our checkpoints

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found, expected = self.teacher.fingerprint(), state_dict["fingerprint"]
        if found != expected:
            raise ValueError(
                f"{self.state_key} changed since the checkpoint: its fingerprint is {found}, "
                f"the checkpoint's {expected}; give back the old teacher, or start a new run"
            )


class TeacherCallback(_CarriesTeacher):
    """The teacher of some tasks.

    Args:
        tasks: names of the tasks that are routed to it.
        teacher: the teacher.
        name: what it is called in tables; default: ``teacher-<tasks>``.

    Raises:
        ValueError: if there is no task.
    """

    def __init__(self, tasks: list[str], teacher: Teacher, name: str | None = None) -> None:
        if not tasks:
            raise ValueError("a TeacherCallback teaches no task; name some in `tasks`")
        self.role = Role(name or f"teacher-{'-'.join(tasks)}", teacher, tasks)

    @property
    @override
    def state_key(self) -> str:
        return f"TeacherCallback/{self.role.name}"


class AnchorCallback(_CarriesTeacher):
    """The frozen anchor of every row: MAR's aesthetic teacher, or GRPO's reference policy.

    Args:
        teacher: the anchor.
        name: what it is called in tables.
    """

    def __init__(self, teacher: Teacher, name: str = "anchor") -> None:
        self.role = Role(name, teacher)

    @property
    @override
    def state_key(self) -> str:
        return "AnchorCallback"  # there is one


class Signals(NamedTuple):
    """What judges and what teaches in a run."""

    judging: Judging
    teaching: Teaching

    def require_tasks(self, tasks: Collection[str]) -> None:
        """Refuse a reward or a teacher for a task that the run does not have.

        Raises:
            ValueError: naming it, and the task that is perhaps meant.
        """
        owners: list[tuple[str, Sequence[str]]] = []
        owners += [(f"reward {scorer.name!r}", scorer.tasks or ()) for scorer in self.judging.scorers]
        owners += [(f"teacher {role.name!r}", role.tasks) for role in self.teaching.roles]
        for owner, own in owners:
            if lost := [task for task in own if task not in tasks]:
                raise ValueError(
                    f"{owner} is for task {lost[0]!r}{perhaps(lost[0], tasks)}, which this run does not have; its "
                    f"prompts are of {', '.join(map(repr, tasks))}"
                )

    def require_labels(self, needs: frozenset[str], tasks: Sequence[str]) -> None:
        """Refuse a run whose callbacks cannot provide the labels that its objective needs.

        Raises:
            ValueError: saying which callback is missing, or which one nobody reads.
        """
        anchor = self.teaching.anchor
        if needs & ({"target", "state_kl", "kl_to_go"} | BRANCHES):
            self.teaching.router.check(tasks)
        if needs & BRANCHES:
            for role in self.teaching.roles:
                at_guidance(role.teacher, 0.0)
        if "anchor" in needs and anchor is None:
            raise ValueError("the objective is Anchored, but there is no anchor; add an AnchorCallback")
        if anchor is not None and "anchor" not in needs:
            raise ValueError(
                "there is an AnchorCallback, but the objective is not Anchored; wrap it in flowopd.core.Anchored"
            )
        if "old" in needs:
            raise ValueError("the objective compares with an old policy, which only an NFTTeacher has; train one")
        if "advantage" in needs:
            self.require_rewards(tasks)

    def require_rewards(self, tasks: Sequence[str]) -> None:
        """Refuse a run in which pictures of some task are judged by nobody.

        Raises:
            ValueError: naming the task.
        """
        if lost := [task for task in tasks if not self.judging.trains(task)]:
            raise ValueError(f"no reward with a weight for task {lost[0]!r}; add a RewardCallback for it")


def signals_among(callbacks: Sequence[Callback], lockstep: bool = False) -> Signals:
    """What the callbacks carry.

    Args:
        callbacks: of a trainer, in their order.
        lockstep: every rank asks every teacher, however its rows are routed.

    Raises:
        ValueError: if a task has two teachers, there are two anchors, or two signals of one name.
    """
    anchors = [callback for callback in callbacks if isinstance(callback, AnchorCallback)]
    refuse_duplicates("anchor", [anchor.state_key for anchor in anchors])
    return Signals(
        Judging([callback.scorer for callback in callbacks if isinstance(callback, RewardCallback)]),
        Teaching(
            [callback.role for callback in callbacks if isinstance(callback, TeacherCallback)],
            anchors[0].role if anchors else None,
            lockstep,
        ),
    )


__all__ = ["AnchorCallback", "RewardCallback", "Signals", "TeacherCallback", "signals_among"]
