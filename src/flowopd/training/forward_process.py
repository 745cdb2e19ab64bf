"""The forward process: finished pictures, noised again."""

from __future__ import annotations

import torch
from torch import Tensor

from flowopd.core.paths import interpolate, velocity_from
from flowopd.records import Rollout, StepBatch


def noised(rollout: Rollout, sigma: Tensor, noise: Tensor) -> StepBatch:
    """The final latents of a rollout at levels σ (B,), with the velocity noise - clean as target.

    Args:
        rollout: B finished trajectories.
        sigma: (B,) in [0, 1].
        noise: (B, C, H, W).
    """
    clean = rollout.latents[:, -1]
    return StepBatch(
        x=interpolate(clean, noise, sigma),
        sigma=sigma,
        sigma_next=torch.zeros_like(sigma),
        noisy=torch.zeros_like(sigma, dtype=torch.bool),
        cond=rollout.cond,
        tasks=[prompt.task for prompt in rollout.prompts],
        metrics=rollout.metrics,
    ).label(target=velocity_from(clean, noise))
