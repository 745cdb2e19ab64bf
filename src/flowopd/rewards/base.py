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
    """Scores of any reward, float32 on the images' device, with its parts if it has some.

    Raises:
        ValueError: if what it returns is not a number per image.
    """
    name = type(reward).__name__
    if not isinstance(reward, DetailedReward):
        return Scores(_column(reward.score(images, prompts), f"{name}.score", images))
    scores: object = reward.detail(images, prompts)
    if not isinstance(scores, Scores):
        raise ValueError(f"{name}.detail returned a {type(scores).__name__}; expected flowopd.rewards.Scores")
    parts = {part: _column(column, f"part {part!r} of {name}", images) for part, column in scores.parts.items()}
    return Scores(_column(scores.value, f"{name}.detail", images), parts)


def _column(numbers: object, what: str, images: Tensor) -> Tensor:
    """Numbers as float32 on the images' device.

    Raises:
        ValueError: unless they are a real tensor of shape (B,).
    """
    expected = f"expected a tensor of shape ({len(images)},), a number per image"
    if not isinstance(numbers, Tensor):
        raise ValueError(f"{what} returned a {type(numbers).__name__}; {expected}")
    if numbers.shape != (len(images),) or numbers.is_complex():
        raise ValueError(f"{what} returned {numbers.dtype} of shape {tuple(numbers.shape)}; {expected}")
    return numbers.detach().to(images.device, torch.float32)


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
