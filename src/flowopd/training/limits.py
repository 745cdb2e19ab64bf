"""What of Lightning's loop cannot be meant where an epoch is an iteration of rollouts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer


def check_fit_limits(trainer: Any, batches: int) -> None:  # noqa: ANN401 - lightning declares few of its flags
    """Refuse what would end, or look, inside an iteration, or leave a part of it out.

    Args:
        trainer: as it was asked for.
        batches: of an iteration on a rank.

    Raises:
        ValueError: saying what to use instead.
    """
    if trainer.fast_dev_run:
        raise ValueError(
            "trainer.fast_dev_run would end inside an iteration; try `flowopd check`, or trainer.max_epochs: 1 with "
            "few data.prompts_per_iteration"
        )
    if trainer.overfit_batches:
        raise ValueError(
            "trainer.overfit_batches would train on the same batches again, which are of another policy by then; give "
            "the data few prompts instead"
        )
    if not _all(trainer.limit_train_batches, batches):
        raise ValueError(
            f"trainer.limit_train_batches is {trainer.limit_train_batches}, but all {batches} batches of an iteration "
            "are trained on; make an iteration smaller by data.prompts_per_iteration"
        )
    _check_accumulation(trainer, batches)
    _check_ends(trainer, batches)
    if getattr(trainer, "val_check_interval", None) != 1.0 or trainer.check_val_every_n_epoch is None:
        raise ValueError(
            "trainer.val_check_interval would validate inside an iteration; use trainer.check_val_every_n_epoch"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise ValueError(
            "trainer.reload_dataloaders_every_n_epochs has nothing to reload: every iteration is sampled anew; leave it"
        )


def check_evaluation_limit(trainer: Any, name: str, batches: int) -> None:  # noqa: ANN401
    """Refuse to score some of the held-out prompts, which would be those of the first task.

    Args:
        trainer: as it was asked for.
        name: of the option, such as ``limit_val_batches``.
        batches: of held-out prompts on a rank.

    Raises:
        ValueError: saying what to use instead.
    """
    limit = getattr(trainer, name)
    if limit and not _all(limit, batches):
        raise ValueError(
            f"trainer.{name} is {limit}, but all {batches} batches of held-out prompts are drawn, or none; give "
            "data.evaluation_count, the held-out prompts per task"
        )


def _all(limit: float, batches: int) -> bool:
    """Lightning counts a whole number in batches, and takes the others for shares."""
    return limit >= batches if isinstance(limit, int) else limit == 1.0


def _check_accumulation(trainer: Any, batches: int) -> None:  # noqa: ANN401
    schedulers = [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]
    for accumulate in [trainer.accumulate_grad_batches, *(n for one in schedulers for n in one.scheduling.values())]:
        if batches % accumulate:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {accumulate}, which does not divide the {batches} batches of an "
                "iteration, so that updates would weigh differently; say updates_per_iteration instead, or choose a "
                f"divisor of {batches}"
            )


def _check_ends(trainer: Any, batches: int) -> None:  # noqa: ANN401
    updates = batches // trainer.accumulate_grad_batches
    if trainer.max_steps > 0 and trainer.max_steps % updates:
        raise ValueError(
            f"trainer.max_steps is {trainer.max_steps}, which ends inside an iteration of {updates} updates; choose a "
            f"multiple of {updates}, or trainer.max_epochs"
        )
    if any(isinstance(one, Timer) and getattr(one, "_interval", "") == "step" for one in trainer.callbacks):
        raise ValueError(
            "trainer.max_time may end inside an iteration; add lightning.pytorch.callbacks.Timer with interval: epoch"
        )
