"""Rollouts as a data module: one Lightning epoch is one rollout iteration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from flowopd.core.ranges import at_least
from flowopd.prompts import GapAware, Mixture, PromptSource
from flowopd.prompts.splits import divided, held_out
from flowopd.records import EvaluationBatch, Prompt, StepBatch
from flowopd.rollouts import Draw, RowNoise
from flowopd.training.limits import check_evaluation_limit, check_fit_limits
from flowopd.training.policy import FlowPolicy
from flowopd.training.roads import Fused, Road, Whole


class RolloutDataModule(LightningDataModule):
    """Samples the current policy's trajectories on its own device and cuts them into step batches.

    Everything random is a function of the seed, the iteration and the row, so that batch sizes and the number of ranks
    change nothing, and the iteration is all there is to resume (with the gaps that ``GapAware`` follows).

    Args:
        prompts: training prompts of each task.
        prompts_per_iteration: distinct prompts of one iteration, over all tasks and ranks.
        group_size: trajectories per prompt (siblings).
        batch_size: rows of one forward; must divide the rows of a rank.
        ratio: shares of the tasks; ``GapAware`` gives more prompts to the task that is farthest from its teacher.
            Default: equal.
        alternate: give whole iterations to one task at a time.
        share_start: siblings start from the same noise.
        fused: the forward that trains a step also advances the trajectory: half the forwards, for objectives that need
            only velocities (``TransitionKL``, ``Anchored``).
        evaluation_prompts: held-out prompts of each task; default: what the training sources hold out.
        evaluation_count: held-out prompts per task; 0 evaluates nothing.
        evaluation_batch_size: images drawn at a time.
        seed: seed of prompts and noise; default: that of the run, ``seed_everything``.

    Raises:
        ValueError: if a number is out of range, or sizes do not divide one another.
    """

    def __init__(
        self,
        prompts: dict[str, PromptSource],
        prompts_per_iteration: int = 16,
        group_size: int = 1,
        batch_size: int = 16,
        ratio: dict[str, int] | GapAware | None = None,
        alternate: bool = False,
        share_start: bool = False,
        fused: bool = False,
        evaluation_prompts: dict[str, PromptSource] | None = None,
        evaluation_count: int = 256,
        evaluation_batch_size: int = 128,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        at_least(
            1,
            prompts_per_iteration=prompts_per_iteration,
            group_size=group_size,
            batch_size=batch_size,
            evaluation_batch_size=evaluation_batch_size,
        )
        at_least(0, evaluation_count=evaluation_count, seed=seed)
        trained, kept = (prompts, evaluation_prompts) if evaluation_prompts else divided(prompts)
        self.mixture = Mixture(trained, ratio, alternate)
        self.mixture.counts(prompts_per_iteration, 0)
        self.prompts_per_iteration = prompts_per_iteration
        self.group_size = group_size
        self.batch_size = batch_size
        self.share_start = share_start
        self.fused = fused
        self.evaluation_prompts = kept
        self.evaluation_count = evaluation_count
        self.evaluation_batch_size = evaluation_batch_size
        self.iteration = 0
        self._seed = seed
        self.check_sizes(ranks=1)

    @cached_property
    def seed(self) -> int:
        """Seed of prompts and noise, settled when it is first asked for."""
        return seed_of_the_run() if self._seed is None else self._seed

    @property
    def policy(self) -> FlowPolicy:
        """The module that is trained."""
        assert self.trainer is not None
        return cast(FlowPolicy, self.trainer.lightning_module)

    @property
    def road(self) -> Road:
        """How draws become batches."""
        return Fused(self.policy) if self.fused else Whole(self.policy, self.group_size)

    def setup(self, stage: str) -> None:
        """Check sizes, signals, the road and the trainer's limits before any long work.

        Raises:
            ValueError: if something does not divide or cannot be meant, or the objective needs what nothing provides.
        """
        assert self.trainer is not None
        self.check_sizes(self.trainer.world_size)
        self.policy.signals.require_tasks([*dict.fromkeys([*self.mixture.sources, *self.evaluation_prompts])])
        if stage == "fit":
            self.policy.check(list(self.mixture.sources))
            self._check_road()
            self._check_gaps()
            check_fit_limits(self.trainer, self._length())
            self._say_seeds()
        verb = TrainerFn(stage).value
        if self.evaluation_count:
            name = {"fit": "val", "validate": "val"}.get(verb, verb)
            check_evaluation_limit(self.trainer, f"limit_{name}_batches", len(self._evaluation_chunks()))
        elif verb == "fit":
            self.trainer.limit_val_batches = 0
        else:
            raise ValueError(f"evaluation_count is 0, so there is nothing to {verb}; set it to 1 or more")

    def _say_seeds(self) -> None:
        if self._seed is not None and self._seed != seed_of_the_run():
            rank_zero_info(f"prompts and noise follow data.seed {self.seed}, the rest seed_everything")

    def check_sizes(self, ranks: int) -> None:
        """Refuse sizes that do not divide over this many ranks.

        Raises:
            ValueError: saying what would.
        """
        if self.prompts_per_iteration % ranks:
            raise ValueError(
                f"{self.prompts_per_iteration} prompts per iteration do not divide over {ranks} ranks; choose a "
                f"multiple of {ranks}, as the {self.group_size} siblings of a prompt stay on one rank"
            )
        rows = self.prompts_per_iteration // ranks * self.group_size
        if rows % self.batch_size:
            raise ValueError(
                f"{self.prompts_per_iteration // ranks} prompts of {self.group_size} siblings are {rows} rows, "
                f"which do not fill batches of {self.batch_size}; choose a batch_size that divides {rows}"
            )

    def _check_road(self) -> None:
        assert self.trainer is not None
        accumulate, together = self.trainer.accumulate_grad_batches, self.road.indivisible()
        if extra := self.policy.needs() - self.road.provides:
            raise ValueError(
                f"fused rollouts cannot provide {sorted(extra)}, which only finished ones have and training needs; "
                "set fused: false"
            )
        if accumulate % together:
            raise ValueError(
                f"accumulate_grad_batches is {accumulate}, so an optimiser step would fall inside a fused trajectory; "
                f"choose a multiple of its {together} trained steps"
            )

    def _check_gaps(self) -> None:
        taught = self.policy.needs() & {"target", "state_kl"} and not self.policy.exchangeable
        if self.mixture.by_gap and not taught:
            raise ValueError(
                "ratio: GapAware follows the distances to the teachers of the visited steps, which "
                f"{type(self.policy).__name__} does not have here; give shares as numbers"
            )

    def learn(self, distances: Mapping[str, Mapping[int, float]]) -> None:
        """Take in the mean squared distances to the teachers of an iteration, by task and step."""
        if self.mixture.by_gap:
            self.mixture.by_gap.learn(distances)

    def train_dataloader(self) -> RolloutLoader:
        """A sized iterable, so that Lightning does not prefetch (a prefetched batch would be off-policy by one)."""
        return RolloutLoader(self._batches, self._length())

    def _chunks(self) -> int:
        """Forwards that this rank's rows of an iteration fill."""
        assert self.trainer is not None
        return self.prompts_per_iteration // self.trainer.world_size * self.group_size // self.batch_size

    def _length(self) -> int:
        """Batches of an iteration on this rank."""
        return self._chunks() * self.policy.batches_per_rollout()

    def _batches(self) -> Iterator[StepBatch]:
        last, shares = self._length() - 1, self._shares_by_gap()
        for index, batch in enumerate(self.road.batches(self.draws())):
            if index == last:  # so that the checkpoint at the end of the epoch counts this iteration as done
                self.iteration += 1
            yield replace(batch, metrics={**batch.metrics, **shares}) if shares else batch

    def _shares_by_gap(self) -> dict[str, float]:
        """What to log of an iteration whose tasks are shared out by their gaps."""
        if not self.mixture.by_gap:
            return {}
        counts = self.mixture.counts(self.prompts_per_iteration, self.iteration)
        shares = {f"mixture/{task}": number / self.prompts_per_iteration for task, number in counts.items()}
        return shares | {f"gap/{task}": gap for task, gap in self.mixture.by_gap.gaps().items()}

    def draws(self) -> list[Draw]:
        """What this rank's forwards of the next iteration draw; nothing is encoded or sampled yet."""
        prompts = self.mixture.draw(self.prompts_per_iteration, self.iteration, self.seed)
        rows = [(group, sibling) for group in self._groups() for sibling in range(self.group_size)]
        chunks = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        key = f"{self.seed} {self.iteration}"  # alike for all rows and ranks
        drawn = self.policy.sampler.draw_steps(key), self.policy.unasked(key)
        return [Draw([prompts[group] for group, _ in chunk], self._noise(chunk), *drawn) for chunk in chunks]

    def _groups(self) -> list[int]:
        """This rank's prompts of the next iteration, by their place in the mixture's draw.

        They are dealt in turns to the ranks, so that an update has the same prompts, each task by its share, for any
        number of ranks that leaves every rank whole prompts per update. Within an update the tasks stay together.
        """
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        dealt = self.mixture.dealt(self.prompts_per_iteration, self.iteration)[rank::ranks]
        size, rest = divmod(len(dealt), self._shares())
        size = 1 if rest else size
        return [group for i in range(0, len(dealt), size) for group in sorted(dealt[i : i + size])]

    def _shares(self) -> int:
        """Into how many parts updates divide this rank's prompts."""
        assert self.trainer is not None
        chunks, steps = self._chunks(), self.policy.batches_per_rollout()
        updates = max(chunks * steps // self.trainer.accumulate_grad_batches, 1)
        if self.policy.exchangeable and steps % updates == 0:  # each takes some batches of every rollout
            return 1
        return updates if chunks % updates == 0 else chunks

    def _noise(self, rows: Sequence[tuple[int, int]]) -> RowNoise:
        keys = [f"{self.seed} {self.iteration} {group} {sibling}" for group, sibling in rows]
        groups = [f"{self.seed} {self.iteration} {group}" for group, _ in rows]
        shape = self.policy.backbone.latent_shape()
        return RowNoise(shape, groups if self.share_start else keys, keys, self.policy.device)

    def evaluation_loader(self) -> RolloutLoader:
        """Held-out prompts of every task, with noise that is the same for every model."""
        return RolloutLoader(self._evaluation_batches, len(self._evaluation_chunks()))

    def val_dataloader(self) -> RolloutLoader:
        """Held-out prompts."""
        return self.evaluation_loader()

    def test_dataloader(self) -> RolloutLoader:
        """Held-out prompts."""
        return self.evaluation_loader()

    def predict_dataloader(self) -> RolloutLoader:
        """Held-out prompts."""
        return self.evaluation_loader()

    def held_out(self) -> list[Prompt]:
        """All held-out prompts, ``evaluation_count`` per task."""
        sources = self.evaluation_prompts.values()
        return [prompt for source in sources for prompt in held_out(source, self.evaluation_count)]

    def few_held_out(self, per_task: int) -> EvaluationBatch:
        """The first held-out prompts of every task, with the noise they have in the evaluation; alike on all ranks."""
        tasks = range(len(self.evaluation_prompts))
        rows = [task * self.evaluation_count + i for task in tasks for i in range(min(per_task, self.evaluation_count))]
        return self._evaluation_batch(self.held_out(), rows)

    def _evaluation_chunks(self) -> list[list[int]]:
        """This rank's rows, padded so that every rank has as many batches of the same sizes."""
        assert self.trainer is not None
        world, total = self.trainer.world_size, self.evaluation_count * len(self.evaluation_prompts)
        rows = list(range(self.trainer.global_rank, total + -total % world, world))
        return [rows[i : i + self.evaluation_batch_size] for i in range(0, len(rows), self.evaluation_batch_size)]

    def _evaluation_batches(self) -> Iterator[EvaluationBatch]:
        prompts, chunks = self.held_out(), self._evaluation_chunks()
        self.policy.backbone.prepare([prompts[row % len(prompts)].text for rows in chunks for row in rows])
        for rows in chunks:
            yield self._evaluation_batch(prompts, rows)

    def _evaluation_batch(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> EvaluationBatch:
        shape = self.policy.backbone.latent_shape()
        noise = RowNoise(shape, [f"evaluation {row}" for row in rows], rows, self.policy.device)
        counted = torch.tensor([row < len(prompts) for row in rows], device=self.policy.device)
        return EvaluationBatch([prompts[row % len(prompts)] for row in rows], noise.start(), counted)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Batches are born on the policy's device."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The iteration is all there is to resume, and what tasks are shared out by."""
        by_gap = self.mixture.by_gap
        return {"iteration": self.iteration} | ({"by_gap": by_gap.state_dict()} if by_gap else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the next iteration."""
        self.iteration = state_dict["iteration"]
        if self.mixture.by_gap and "by_gap" in state_dict:  # else they are measured from here on
            self.mixture.by_gap.load_state_dict(state_dict["by_gap"])


@dataclass
class RolloutLoader:
    """A sized iterable; not a torch DataLoader, so Lightning injects no sampler.

    Args:
        batches: makes a generator; nothing runs before its first ``next``.
        length: how many batches it yields, the same on every rank.
    """

    batches: Callable[[], Iterator[Any]]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


def seed_of_the_run() -> int:
    """What ``seed_everything`` was given; 0 where nobody said."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
