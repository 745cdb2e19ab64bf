"""The trained adapter, for everybody else, with its card."""

from __future__ import annotations

import os

from lightning import Callback, LightningModule, Trainer

from flowopd.core.shown import shown
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.training.callbacks.around import policy_of, run_folder
from flowopd.training.policy import FlowPolicy


class AdapterExport(Callback):
    """Writes the trained adapter to ``<run>/adapter`` when the fit ends: for peft, for diffusers, and with a card."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather it on all ranks, write it once."""
        if not isinstance(pl_module, FlowPolicy):
            return
        adapter = pl_module.student()
        if trainer.is_global_zero:
            export_adapter(adapter, run_folder(trainer) / "adapter", card(policy_of(pl_module)))


def card(policy: FlowPolicy) -> ModelCard:
    """How the policy's adapter was made."""
    trainer, data = policy.trainer, getattr(policy.trainer, "datamodule", None)
    facts = {
        "objective": shown(policy.objective),
        "sampler": shown(policy.sampler),
        "start": shown(policy.start) if policy.start is not None else "a new adapter",
        "training": f"{trainer.current_epoch} iterations, {trainer.global_step} optimiser steps",
        "seed": f"{getattr(data, 'seed', None)} (prompts and noise), {os.environ.get('PL_GLOBAL_SEED')} (everything)",
    }
    if strategy := getattr(policy, "strategy", None):
        facts["strategy"] = shown(strategy)
    teachers = [
        (name, shown(teacher), teacher.fingerprint())
        for name, teacher in policy.signals.teaching.teachers_by_name().items()
    ]
    base = getattr(policy.backbone, "path", type(policy.backbone).__name__)
    return ModelCard(base, type(policy).__name__, facts, teachers, policy.sampler.guidance_scale)
