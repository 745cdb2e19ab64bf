"""The trained adapter, for everybody else, with its card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flowopd.core.shown import shown
from flowopd.models import DiffusersBackbone
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.rollouts import Sampler
from flowopd.training.callbacks.around import run_folder
from flowopd.training.callbacks.ema import averaged
from flowopd.training.policy import FlowPolicy


class AdapterExport(Callback):
    """Writes the trained adapter to ``<run>/adapter`` as soon as training ends: for peft and diffusers, with a card."""

    def __init__(self) -> None:
        self._exported = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exported = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._exported:  # nothing was trained: a merge, or a run that had ended
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the average, if there is one, on all ranks; write it once."""
        if not isinstance(pl_module, FlowPolicy):
            return
        self._exported = True
        with averaged(trainer):
            adapter = pl_module.student()
        if trainer.is_global_zero:
            export_adapter(adapter, run_folder(trainer) / "adapter", card(pl_module))


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
    backbone, scale = policy.backbone, policy.sampler.guidance_scale
    told = ModelCard(
        base=getattr(backbone, "path", type(backbone).__name__),
        made_by=type(policy).__name__,
        facts=facts,
        teachers=teachers,
        guidance_scale=scale,
        pipeline=backbone.pipeline_name,
        call=backbone.call(scale),
    )
    if not isinstance(backbone, DiffusersBackbone):
        return told
    absent = [part for part in (*backbone.encoders, *backbone.tokenizers) if not backbone.reads(part)]
    dtype = str(backbone.dtype).removeprefix("torch.")
    return replace(told, drawing=drawing(policy.sampler, backbone), dtype=dtype, absent=absent)


def drawing(sampler: Sampler, backbone: DiffusersBackbone) -> dict[str, Any]:
    """What the stock pipeline is called with to draw as the policy is evaluated, besides its guidance."""
    sides = backbone.resolution if isinstance(backbone.resolution, Sequence) else [backbone.resolution] * 2
    size = dict(zip(("height", "width"), sides, strict=True)) if backbone.resolution else {}
    return size | _steps(sampler, backbone) | {"max_sequence_length": backbone.max_sequence_length}


def _steps(sampler: Sampler, backbone: DiffusersBackbone) -> dict[str, Any]:
    """The steps of an evaluation: as many on the pipeline's own grid, else their noise levels, where it takes them."""
    number = {"num_inference_steps": sampler.eval_steps}
    try:
        scheduler, stock = backbone.files.config("scheduler"), backbone.stock_sigmas(sampler.eval_steps)
    except (OSError, ValueError):  # a card is worth no failure
        return number
    levels = sampler.schedule.sigmas(sampler.eval_steps)
    shifted = scheduler.get("shift", 1.0) != 1 or scheduler.get("use_dynamic_shifting")
    if shifted or torch.allclose(levels, stock.to(levels), atol=1e-4):
        return number
    return {"sigmas": [round(level, 6) for level in levels[:-1].tolist()]}
