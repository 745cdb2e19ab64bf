"""The trained adapter, for everybody else, with its card."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from flowopd.models import Backbone
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
        "objective": described(policy.objective),
        "sampler": described(policy.sampler),
        "start": described(policy.start) if policy.start is not None else "a new adapter",
        "training": f"{trainer.current_epoch} iterations, {trainer.global_step} optimiser steps",
        "seed": f"{getattr(data, 'seed', None)} (prompts and noise), {os.environ.get('PL_GLOBAL_SEED')} (everything)",
    }
    if strategy := getattr(policy, "strategy", None):
        facts["strategy"] = described(strategy)
    teachers = [
        (name, described(teacher), teacher.fingerprint())
        for name, teacher in policy.signals.teaching.teachers_by_name().items()
    ]
    base = getattr(policy.backbone, "path", type(policy.backbone).__name__)
    return ModelCard(base, type(policy).__name__, facts, teachers, policy.sampler.guidance_scale)


def described(thing: Any, depth: int = 3) -> str:  # noqa: ANN401
    """A plain object by its class and public attributes.

    >>> from flowopd.core import Anchored, TransitionKL
    >>> described(Anchored(TransitionKL(), strength=2.5))
    'Anchored(objective=TransitionKL(weighting=ExactKL()), strength=2.5, weighting=ExactKL())'
    """
    if isinstance(thing, list | tuple):
        return f"[{', '.join(described(item, depth) for item in thing)}]"
    if thing is None or isinstance(thing, str | int | float | bool):
        return str(thing)
    if not depth or not hasattr(thing, "__dict__") or isinstance(thing, Backbone | torch.Tensor | torch.nn.Module):
        return type(thing).__name__
    public = {name: value for name, value in vars(thing).items() if not name.startswith("_") and name != "needs"}
    return f"{type(thing).__name__}({', '.join(f'{k}={described(v, depth - 1)}' for k, v in public.items())})"
