"""What the scores of a model follow from, if nobody trains it: so that one run measures it for all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from flowopd import __version__
from flowopd.core.shown import shown
from flowopd.evaluation.benchmark import made
from flowopd.models import DiffusersBackbone
from flowopd.teachers.composed import guidance_said
from flowopd.teachers.teaching import Role
from flowopd.training.callbacks.around import data_of
from flowopd.training.callbacks.fixed_states import FixedStateKL
from flowopd.training.policy import FlowPolicy

SCORES = "FLOWOPD_SCORES"
"""What tells a run the folder of scores that the runs of its study share."""

DIGESTS = "digests.json"
"""Digests of a model's files, kept there until they change."""


def facts_of(policy: FlowPolicy, name: str, folder: Path) -> dict[str, Any] | None:
    """All that the scores of the base, a teacher or the anchor follow from, but for the code of rewards.

    Args:
        policy: whose run it is.
        name: of the model.
        folder: where digests of large files are kept.

    Returns:
        Facts for JSON; none of a model whose files are not known.
    """
    backbone, trainer = policy.backbone, policy.trainer
    if not isinstance(backbone, DiffusersBackbone):
        return None
    parts = ["transformer", "vae", *backbone.text_parts()]
    teachers = {"base": policy.base(), **policy.signals.teaching.teachers_by_name()}
    return {
        "versions": [__version__, torch.__version__],
        "device": [trainer.strategy.root_device.type, trainer.precision, trainer.world_size],
        "files": backbone.files.identity(parts, folder / DIGESTS),
        "backbone": {key: str(getattr(backbone, key)) for key in READ},
        "model": _role(Role(name, teachers[name])),
        "drawn": [*policy.sampler.schedule.sigmas(policy.sampler.eval_steps).tolist(), *backbone.latent_shape()],
        "prompts": _prompts(policy),
        "scores": [_scorer(scorer) for scorer in policy.signals.judging.scorers],
        "fixed states": [_fixed(policy, one) for one in trainer.callbacks if isinstance(one, FixedStateKL)],  # type: ignore[attr-defined]
    }


READ = ("identity", "resolution", "max_sequence_length")
"""Of a backbone, what changes what it draws."""


def _role(role: Role) -> list[Any]:
    return [*role.tasks, shown(role.teacher), role.teacher.fingerprint(), guidance_said(role.teacher)]


def _prompts(policy: FlowPolicy) -> list[Any]:
    data = data_of(policy.trainer)
    texts = [[prompt.text, prompt.task, prompt.metadata] for prompt in data.held_out()]
    digest = hashlib.sha256(json.dumps(texts, default=str).encode()).hexdigest()
    return [digest, data.evaluation_count, data.evaluation_batch_size]


def _scorer(scorer: Any) -> list[Any]:  # noqa: ANN401
    reward = scorer.reward
    which = [scorer.name, scorer.tasks, scorer.in_average, scorer.columns, scorer.macro]
    return [*which, type(reward).__module__, made(reward)]


def _fixed(policy: FlowPolicy, callback: FixedStateKL) -> list[Any]:
    roles = [[role.name, *_role(role)] for role in policy.signals.teaching.roles]
    return [callback.prompts_per_task, shown(callback.dynamics), roles]
