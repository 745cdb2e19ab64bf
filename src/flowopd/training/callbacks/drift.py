"""How pictures drift from those at the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from flowopd.core.ranges import at_least
from flowopd.evaluation.drift import drift_changes, drift_figures
from flowopd.training.callbacks.around import data_of, policy_of
from flowopd.training.policy import FlowPolicy


class DriftMetrics(Callback):
    """Logs the figures of ``flowopd.evaluation.drift`` beside the rewards, and their changes since the start.

    A few held-out prompts are drawn from fixed noise before the first update and with every validation:
    ``drift/<figure>`` and ``drift/<figure>_change``. Pictures that a rollout decodes (GRPO) are measured too:
    ``rollout_drift/<figure>`` and ``rollout_drift/<figure>_change``. ``Guard`` raises the alarm.

    Args:
        prompts_per_task: held-out pictures of each task.

    Raises:
        ValueError: if that is less than one.
    """

    def __init__(self, prompts_per_task: int = 8) -> None:
        at_least(1, prompts_per_task=prompts_per_task)
        self.prompts_per_task = prompts_per_task
        self.start: dict[str, dict[str, float]] = {}
        self._seen: list[dict[str, float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            policy_of(pl_module).watchers.append(self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "drift" not in self.start and data_of(trainer).evaluation_count:  # else a checkpoint remembers it
            self.start["drift"] = self._held_out(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and "drift" in self.start:
            self._log("drift", self._held_out(trainer, pl_module), pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = []

    def see(self, images: Tensor) -> None:
        """Measure pictures (B, 3, H, W) in [0, 1] that a rollout ended in."""
        self._seen.append(drift_figures(images))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self._seen:  # the rollouts are there with the first batch
            figures = {name: sum(one[name] for one in self._seen) / len(self._seen) for name in self._seen[0]}
            self.start.setdefault("rollout_drift", figures)
            self._log("rollout_drift", figures, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(policy_of(pl_module))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(policy_of(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}  # a resumed run cannot measure it again

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _held_out(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        batch = data_of(trainer).few_held_out(self.prompts_per_task)
        return drift_figures(policy_of(pl_module).draw(batch.prompts, batch.noise))

    def _log(self, stage: str, figures: Mapping[str, float], module: LightningModule) -> None:
        changes = {f"{name}_change": value for name, value in drift_changes(figures, self.start[stage]).items()}
        named = {f"{stage}/{name}": value for name, value in {**figures, **changes}.items()}
        module.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _leave(self, policy: FlowPolicy) -> None:
        policy.watchers = [watcher for watcher in policy.watchers if watcher is not self]
