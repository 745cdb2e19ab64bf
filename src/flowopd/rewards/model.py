"""Rewards with weights: read on first use, scored in batches, off the accelerator between uses if asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes


class ModelReward(ABC):
    """A frozen network that scores; subclasses read it and run it on one batch.

    Args:
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.
    """

    def __init__(self, batch_size: int = 16, offload: bool = False) -> None:
        self.batch_size = batch_size
        self.offload = offload
        self._loaded = False

    @abstractmethod
    def read(self) -> None:
        """Read the weights into memory; called once.

        Raises:
            FileNotFoundError: if they are not there, saying where to get them.
        """

    @abstractmethod
    def networks(self) -> Iterable[nn.Module]:
        """The networks that were read."""

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of one batch, images (b, 3, H, W) uint8, b ≤ ``batch_size``."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights if that has not been done, and bring them to ``device``."""
        if not self._loaded:
            self.read()
            self._loaded = True
        for network in self.networks():
            network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores (B,) on the images' device, batch by batch."""
        images = as_bytes(images, prompts)
        self.load(images.device)
        chunks = range(0, len(images), self.batch_size)
        scores = [self.forward(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in chunks]
        if self.offload:
            self.load("cpu")
        return Scores.cat(scores)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device."""
        return self.detail(images, prompts).value
