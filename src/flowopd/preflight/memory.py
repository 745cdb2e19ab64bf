"""A device that is full: one sentence, with the number to lower."""

from __future__ import annotations

import inspect
import re
import traceback

import torch

from flowopd.models import Backbone
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule

DRAWING = {inspect.unwrap(function).__code__ for function in (FlowPolicy.draw, FlowPolicy.columns)}
"""What draws held-out pictures, in an evaluation or a callback."""

SEE = "flowopd plan says what takes how much"


def out_of_memory(error: torch.OutOfMemoryError, policy: FlowPolicy, data: RolloutDataModule) -> str:
    """What was done when the device was full, and which number to lower."""
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
    full = "the device ran out of memory" + (f" ({asked[0].replace('T', 't', 1)})" if asked else "")
    frames = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    if frames & DRAWING:
        return f"{full} while held-out pictures were drawn; {_lower('data.evaluation_batch_size', data)}; {SEE}"
    return f"{full} while sampling or training; {_lower('data.batch_size', data)}{_recompute(policy.backbone)}; {SEE}"


def _lower(option: str, data: RolloutDataModule) -> str:
    now = getattr(data, option.removeprefix("data."))
    return f"lower {option}, which is {now}" if now > 1 else "make model.backbone.resolution smaller"


def _recompute(backbone: Backbone) -> str:
    keeps = not getattr(backbone, "activation_checkpointing", True)
    return ", or set model.backbone.activation_checkpointing" if keeps else ""
