"""Alarms while training: numbers that are none, policies that run away, pictures that collapse."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from flowopd.core.names import perhaps
from flowopd.core.objectives import anchor_share
from flowopd.core.ranges import above, at_least, finite
from flowopd.training.policy import FlowPolicy

# Changes against the start, as `evaluation.drift.drift_changes` defines them, that no healthy run has shown.
DRIFT: Mapping[str, tuple[float, float]] = {
    "dark_fraction": (-1.0, 0.3),
    "edge_density": (-0.6, 3.0),
    "colour_entropy": (-0.5, 1.0),
    "sharpness": (-0.9, 9.0),
    "diversity": (-0.6, 3.0),
}

# Distances that no iteration may exceed by far, by the end of their names, and what is small for each: a mean squared
# error of velocities, whose own mean square is about 1; and nats per latent dimension, of which a step has the more the
# less noise it has.
SMALL: Mapping[str, float] = {"/velocity_mse": 0.01, "anchor/loss": 1.0}


class Alarm(ValueError):
    """A run that should not go on; says in one sentence what was seen."""


class Guard(Callback):
    """Stops a run, or warns, before a bad state is saved; the last good checkpoint survives.

    Looks at the loss and the gradient before every optimiser step (a bad one is not taken), and at the end of every
    iteration at the weights and at what was logged: ratios, the distances to teacher and anchor, pictures.

    A distance differs between steps, and a run may draw anew which steps it trains. So it is compared with its largest
    value in the first ``warm_up`` iterations, which have seen most steps (of the anchor, as many more as it is asked
    about fewer steps); in these it may exceed the largest so far by the square of ``growth``.

    Args:
        on_alarm: ``stop`` ends the run with one sentence; ``warn`` says it once, keeps a copy of the last checkpoint as
            ``good.ckpt`` and goes on.
        log_ratio: largest ``*/log_ratio`` of an iteration, in absolute nats per latent dimension.
        growth: largest factor by which ``*/velocity_mse`` may exceed its largest value in the first iterations, or
            0.01, and ``anchor/loss`` its own, or 1 nat per latent dimension.
        warm_up: iterations that show how large these are in a healthy run.
        limits: largest absolute value of other logged metrics, by name.
        drift: lowest and highest change of each figure of ``DriftMetrics`` since the start; default: ``DRIFT``.

    Raises:
        ValueError: if a limit is none.
    """

    def __init__(
        self,
        on_alarm: Literal["stop", "warn"] = "stop",
        log_ratio: float = 0.05,
        growth: float = 5.0,
        warm_up: int = 10,
        limits: dict[str, float] | None = None,
        drift: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        at_least(0.0, log_ratio=log_ratio, **(limits or {}))
        above(1.0, growth=growth)
        at_least(1, warm_up=warm_up)
        _check_drift(drift or {})
        self.on_alarm = on_alarm
        self.log_ratio = log_ratio
        self.growth = growth
        self.warm_up = warm_up
        self.limits = limits or {}
        self.drift = {**DRIFT, **(drift or {})}
        self.start: dict[str, float] = {}
        self._finite_loss: Tensor | None = None
        self._told: set[str] = set()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        finite = loss.detach().isfinite()  # asked for at the update: waiting for the device here would cost time
        self._finite_loss = finite if self._finite_loss is None else self._finite_loss & finite

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        finite = self._finite_loss is None or bool(self._finite_loss)
        self._finite_loss = None
        if _anywhere(trainer, not finite):
            self._refuse_update(trainer, pl_module, "the loss is not a finite number")
        elif not _is_scaled(trainer) and _anywhere(trainer, bool(_bad(_gradients(pl_module)))):
            names = ", ".join(_bad(_gradients(pl_module))[:1]) or "on another rank"
            self._refuse_update(trainer, pl_module, f"the gradient is not finite ({names})")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # lightning saves the iteration's checkpoint after this
        if _anywhere(trainer, bool(_bad(_weights(pl_module)))):
            self._raise(trainer, "weights", "the trained weights are not finite")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        share = anchor_share(pl_module.objective) if isinstance(pl_module, FlowPolicy) else 1.0
        for name, value in metrics.items():
            seen = int(trainer.current_epoch * (share if name == "anchor/loss" else 1))
            if (reason := self._fault(name, value, seen)) is not None:
                self._raise(trainer, name, f"{name} is {value:.3g}, {reason}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _fault(self, name: str, value: float, iteration: int) -> str | None:
        """What is wrong with a metric, of which so many iterations were seen before."""
        if name.endswith("/loss") and not math.isfinite(value):
            return "not a finite number"
        if name.endswith("/log_ratio") and not abs(value) <= self.log_ratio:
            return f"beyond the limit of {self.log_ratio:g} nats per latent dimension"
        if name in self.limits and not abs(value) <= self.limits[name]:
            return f"beyond its limit of {self.limits[name]:g}"
        for end, small in SMALL.items():
            if name.endswith(end):
                return self._grown(name, value, small, iteration)
        return self._drifted(name, value)

    def _grown(self, name: str, value: float, small: float, iteration: int) -> str | None:
        """Whether a distance is far beyond what the run began with; a student may start at its teacher."""
        begun = iteration >= self.warm_up
        largest = self.start.get(name, value if math.isfinite(value) else 0.0)
        if not begun and math.isfinite(value):
            self.start[name] = max(largest, value)
        factor = self.growth if begun else self.growth**2
        if value <= factor * max(largest, small):
            return None
        return f"more than {factor:g} times the {max(largest, small):.3g} of the first iterations"

    def _drifted(self, name: str, value: float) -> str | None:
        stage, _, figure = name.removesuffix("_change").partition("/")
        if stage not in ("drift", "rollout_drift") or not name.endswith("_change") or figure not in self.drift:
            return None
        low, high = self.drift[figure]
        return None if low <= value <= high else f"outside [{low:g}, {high:g}]: the pictures changed since the start"

    def _refuse_update(self, trainer: Trainer, module: LightningModule, saw: str) -> None:
        self._raise(trainer, saw, f"{saw} in update {trainer.global_step + 1}, which was not taken")
        for parameter in module.parameters():  # warned: leave the update out
            parameter.grad = None

    def _raise(self, trainer: Trainer, kind: str, saw: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        last = _last_checkpoint(trainer)
        if self.on_alarm == "stop":
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise Alarm(f"stopped in iteration {trainer.current_epoch + 1}: {saw}; {kept}")
        kept = f"; the last checkpoint is kept as {_keep(trainer, last)}" if last else ""
        rank_zero_warn(f"iteration {trainer.current_epoch + 1}: {saw}{kept}")


def _check_drift(drift: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in drift.items():
        if name not in DRIFT:
            raise ValueError(f"drift knows no {name!r}{perhaps(name, DRIFT)}; it knows: {', '.join(DRIFT)}")
        finite(**{f"lower end of {name}": low, f"upper end of {name}": high})
        if low > high:
            raise ValueError(f"drift of {name} is from {low} to {high}; expected the smaller number first")


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _bad(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not finite; of sharded ones, this rank's part is looked at."""
    if not tensors:
        return []
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors.values()]
    finite = torch.stack([part.isfinite().all() for part in local]).tolist()
    return [name for name, ok in zip(tensors, finite, strict=True) if not ok]


def _anywhere(trainer: Trainer, here: bool) -> bool:
    """Whether it is so on any rank; all ranks learn the same."""
    return bool(trainer.strategy.reduce_boolean_decision(here, all=False))


def _is_scaled(trainer: Trainer) -> bool:
    """Whether a gradient scaler (16-mixed) looks for overflows itself, and skips their updates."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _last_checkpoint(trainer: Trainer) -> Path | None:
    saver = trainer.checkpoint_callback
    path = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
    return Path(path) if path and Path(path).exists() else None


def _keep(trainer: Trainer, last: Path) -> Path:
    kept = last.with_name("good.ckpt")
    if trainer.is_global_zero and not kept.exists():
        (shutil.copytree if last.is_dir() else shutil.copy)(last.resolve(), kept)
    return kept
