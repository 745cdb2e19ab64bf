"""The Reward protocol, scores with their parts, and what every reward asks of its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from flowopd.records import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores images, higher is better.

    Implementations repeat these annotations exactly: the command line checks them when it parses a config.
    """

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image against its prompt.

        Args:
            images: (B, 3, H, W), float in [0, 1] or uint8.
            prompts: B prompts.

        Returns:
            (B,) float32 on the images' device; NaN where scoring failed.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of B images, and what they are made of.

    Args:
        value: (B,) float32; NaN where scoring failed.
        parts: by name, (B,) each; NaN where a part does not apply.
    """

    value: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(pieces: Sequence["Scores"]) -> "Scores":
        """Stack along the batch; a part that a piece does not have is NaN there."""
        if not pieces:
            return Scores(torch.zeros(0))
        names = dict.fromkeys(name for piece in pieces for name in piece.parts)
        return Scores(
            torch.cat([piece.value for piece in pieces]),
            {name: torch.cat([piece._part(name) for piece in pieces]) for name in names},
        )

    def to(self, device: torch.device) -> "Scores":
        """The same on ``device``."""
        return Scores(self.value.to(device), {name: part.to(device) for name, part in self.parts.items()})

    def _part(self, name: str) -> Tensor:
        return self.parts.get(name, torch.full_like(self.value, torch.nan))


@runtime_checkable
class DetailedReward(Reward, Protocol):
    """A reward that can also say what its scores are made of."""

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score as ``score`` does, with the parts."""
        ...


def detailed(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """Scores of any reward, with its parts if it has some."""
    if isinstance(reward, DetailedReward):
        return reward.detail(images, prompts)
    return Scores(reward.score(images, prompts))


def as_bytes(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Images as every published scorer reads them,  round(255 · image).

    Args:
        images: (B, 3, H, W), float in [0, 1] or uint8.
        prompts: B prompts.

    Returns:
        (B, 3, H, W) uint8.

    Raises:
        ValueError: on another type, shape, dtype, range or number of prompts.
    """
    if not isinstance(cast(object, images), Tensor):
        raise ValueError(f"expected images as a tensor of shape (B, 3, H, W), got {type(images).__name__}")
    if wrong := [prompt for prompt in cast(Sequence[object], prompts) if not isinstance(prompt, Prompt)]:
        raise ValueError(f"expected prompts as flowopd.Prompt(text, task), got {wrong[0]!r}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt per image, got {len(images)} images and {len(prompts)} prompts")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"expected images of dtype uint8, or float in [0, 1], got {images.dtype}")
    if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # also false for a NaN
        raise ValueError(f"expected images in [0, 1], got [{float(images.amin()):.3g}, {float(images.amax()):.3g}]")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
