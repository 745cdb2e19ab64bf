"""Prompts drawn by one backbone, as it is and with adapters, from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowopd.models import Backbone
from flowopd.records import Conditioning
from flowopd.rollouts import RowNoise, Sampler

ROWS = 4
"""Pictures at a time."""


@dataclass(frozen=True)
class Hand:
    """Who draws.

    Args:
        adapter: name of an adapter on the backbone; None for the base.
        guidance_scale: at which it draws.
    """

    adapter: str | None
    guidance_scale: float


@torch.no_grad()
def draw(
    backbone: Backbone, sampler: Sampler, texts: Sequence[str], hands: Mapping[str, Hand], seed: int = 0
) -> dict[str, Tensor]:
    """Draw B texts by everybody; row k of all starts from the same noise, which follows from the seed and k.

    Returns:
        Pictures (B, 3, H, W) in [0, 1] of each, on the CPU.
    """
    device = next(backbone.network.parameters()).device
    keys = [f"drawn {seed} {row}" for row in range(len(texts))]
    noise = RowNoise(backbone.latent_shape(), keys, keys, device)
    backbone.prepare(texts)

    def drawn(hand: Hand, rows: slice) -> Tensor:
        def field(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            return backbone.velocity(x, sigma, cond, hand.adapter, hand.guidance_scale)

        return backbone.decode(sampler.draw(field, backbone.encode(texts[rows]), noise[rows].start())).cpu()

    parts = [slice(first, first + ROWS) for first in range(0, len(texts), ROWS)]
    return {name: torch.cat([drawn(hand, rows) for rows in parts]) for name, hand in hands.items()}
