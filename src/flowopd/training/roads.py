"""Two roads from prompts to batches that are trained on: whole trajectories first, or one step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from typing import Protocol

import torch

from flowopd.core.dynamics import Transition
from flowopd.core.objectives import BRANCHES, Labels
from flowopd.records import Rollout, StepBatch
from flowopd.rollouts import Draw
from flowopd.training.policy import FlowPolicy


class Road(Protocol):
    """How the draws of an iteration become the batches that it trains on."""

    provides: frozenset[str]
    """The labels that its batches can have."""

    def batches(self, draws: Sequence[Draw]) -> Iterator[StepBatch]:
        """Sample with the current policy and label, ``policy.batches_per_rollout()`` batches per draw."""
        ...

    def indivisible(self) -> int:
        """How many consecutive batches no optimiser step may part."""
        ...


class Whole:
    """Every trajectory of an iteration is sampled to its end and labelled; then all are trained on, cut into steps.

    Args:
        policy: what samples and is trained.
        group_size: siblings of a prompt, next to each other.
    """

    provides = frozenset(field.name for field in fields(Labels))

    def __init__(self, policy: FlowPolicy, group_size: int = 1) -> None:
        self.policy = policy
        self.group_size = group_size

    def batches(self, draws: Sequence[Draw]) -> Iterator[StepBatch]:
        """Those of a rollout follow one another; where they are exchangeable, the first of all rollouts come first."""
        cuts = [self._cut(rollout, draw) for rollout, draw in zip(self.rollouts(draws), draws, strict=True)]
        for batch, needs in chain.from_iterable(zip(*cuts, strict=True) if self.policy.exchangeable else cuts):
            with sampling(self.policy):
                labelled = self.policy.signals.teaching.label(batch, needs)
            yield labelled

    def _cut(self, rollout: Rollout, draw: Draw) -> Iterator[tuple[StepBatch, frozenset[str]]]:
        """Batches of a rollout, each with the labels that it needs."""
        for number, batch in enumerate(self.policy.cut(rollout, draw)):
            yield batch, draw.needs(number, self.policy.needs())

    def rollouts(self, draws: Sequence[Draw]) -> list[Rollout]:
        """Finished trajectories, with the labels that only these can have."""
        _prepare(self.policy, draws)
        with sampling(self.policy):
            rollouts = [self.policy.rollout(draw) for draw in draws]
            return self.policy.label(rollouts, self.group_size)

    def indivisible(self) -> int:
        """Any batch may be the last of an optimiser step."""
        return 1


class Fused:
    """The forward that trains a step also advances the trajectory: one state in memory, and half the forwards.

    Args:
        policy: what samples and is trained.
    """

    provides = BRANCHES | {"target", "anchor"}

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy = policy

    def batches(self, draws: Sequence[Draw]) -> Iterator[StepBatch]:
        """Batches of visited states, each to be advanced by its training step before the next is asked for."""
        _prepare(self.policy, draws)
        for draw in draws:
            yield from self._trajectories(draw)

    def _trajectories(self, draw: Draw) -> Iterator[StepBatch]:
        policy, sampler = self.policy, self.policy.sampler
        cond = policy.backbone.encode(draw.texts)
        field = policy.behaviour(draw.tasks)
        numbers = {j: number for number, j in enumerate(draw.trained)}

        x = draw.noise.start()
        for j in range(max(draw.trained) + 1):  # what follows the last trained state is not needed
            batch, taken = sampler.batch_at(x, j, cond, draw.tasks), _Taken()
            if j in draw.trained:
                needs = draw.needs(numbers[j], policy.needs())
                with sampling(policy):
                    labelled = policy.signals.teaching.label(batch, needs)
                yield replace(labelled, advance=taken.put, counts=draw.trained[j])
            else:
                with sampling(policy):
                    taken.put(sampler.transition(batch, field(x, batch.sigma, cond)))
            x = sampler.follow(taken.get(), j, draw.noise)

    def indivisible(self) -> int:
        """An optimiser step inside a trajectory would make it one of two policies."""
        return self.policy.batches_per_rollout()


class _Taken:
    """The slot through which a training step hands back the transition that its trajectory takes."""

    def __init__(self) -> None:
        self._transition: Transition | None = None

    def put(self, transition: Transition) -> None:
        self._transition = transition

    def get(self) -> Transition:
        assert self._transition is not None, "the training step did not advance its trajectory"
        return self._transition


@contextmanager
def sampling(policy: FlowPolicy) -> Iterator[None]:
    """No gradient, and the precision of the training forward (else the ratio would not start at 1)."""
    with torch.no_grad(), policy.trainer.precision_plugin.forward_context():
        yield


def _prepare(policy: FlowPolicy, draws: Sequence[Draw]) -> None:
    """Encode every text of an iteration at once: the encoders are read once for all."""
    policy.backbone.prepare([text for draw in draws for text in draw.texts])
