"""How pictures drift from those at the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from flowopd.evaluation.drift import drift_changes, drift_figures
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule


class DriftMetrics(Callback):
    """Logs the figures of ``flowopd.evaluation.drift`` beside the rewards, and their changes since the start.

    A few held-out prompts are drawn from fixed noise before the first update and with every validation:
    ``drift/<figure>`` and ``drift/<figure>_change``. Pictures that a rollout decodes (GRPO) are measured too:
    ``rollout_drift/<figure>`` and ``rollout_drift/<figure>_change``. ``Guard`` raises the alarm.

    Args:
        prompts_per_task: held-out pictures of each task.
    """

    def __init__(self, prompts_per_task: int = 8) -> None:
        self.prompts_per_task = prompts_per_task
        self.start: dict[str, dict[str, float]] = {}
        self._seen: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy before its first update, unless a checkpoint remembers it."""
        if "drift" not in self.start:
            self.start["drift"] = self._held_out(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy that was just validated."""
        if trainer.state.fn == "fit" and "drift" in self.start:
            self._log("drift", self._held_out(trainer, pl_module), pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the next rollouts decode; a decoder is the one door that every picture comes through."""
        backbone, self._seen = cast(FlowPolicy, pl_module).backbone, []
        decode = backbone.decode

        def watched(latents: Tensor) -> Tensor:
            images = decode(latents)
            self._seen.append(drift_figures(images))
            return images

        vars(backbone)["decode"] = watched

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """The rollouts are there with the first batch."""
        if batch_idx > 0:
            return
        self._unwatch(pl_module)
        if self._seen:
            figures = {name: sum(one[name] for one in self._seen) / len(self._seen) for name in self._seen[0]}
            self.start.setdefault("rollout_drift", figures)
            self._log("rollout_drift", figures, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the backbone as it was."""
        self._unwatch(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The figures at the start: a resumed run cannot measure them again."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the start."""
        self.start = state_dict["start"]

    def _held_out(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        data = cast(RolloutDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        batch = data.few_held_out(self.prompts_per_task)
        return drift_figures(cast(FlowPolicy, pl_module).draw(batch.prompts, batch.noise))

    def _log(self, stage: str, figures: Mapping[str, float], module: LightningModule) -> None:
        changes = {f"{name}_change": value for name, value in drift_changes(figures, self.start[stage]).items()}
        named = {f"{stage}/{name}": value for name, value in {**figures, **changes}.items()}
        module.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _unwatch(self, pl_module: LightningModule) -> None:
        vars(cast(FlowPolicy, pl_module).backbone).pop("decode", None)
