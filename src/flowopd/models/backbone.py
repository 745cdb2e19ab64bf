"""The Backbone: one frozen network that carries every policy as an adapter."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowopd.core.guidance import guided
from flowopd.core.schedules import Schedule
from flowopd.core.tensors import picks
from flowopd.models.adapters.lora import ATTENTION
from flowopd.records import Conditioning


class Question(NamedTuple):
    """Some rows of a batch, to be answered by one adapter, or by the base model for ``None``, at its own guidance."""

    adapter: str | None
    guidance_scale: float
    rows: Sequence[int]


class Backbone(ABC):
    """A frozen text-to-image model with named adapters; which one a forward uses is part of the call."""

    guidance_scale: float | None = None
    """At which guidance the model by itself is meant to be drawn; None if nobody says."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The velocity network that carries the adapters."""

    @property
    def identity(self) -> Hashable:
        """What it will read: backbones that agree in this answer alike, and teachers share one of them."""
        return id(self)

    @cached_property
    def companions(self) -> "dict[Hashable, Backbone]":
        """Backbones that teachers have brought beside this one, by what and where they are: each is carried once."""
        return {}

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights; doing it twice is doing it once."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent."""

    def schedule(self) -> Schedule:
        """The noise levels that the model is meant for, where a sampler is given none.

        Raises:
            ValueError: if it has none.
        """
        raise ValueError(f"a {type(self).__name__} has no noise levels of its own; give the sampler a schedule")

    @property
    def targets(self) -> Sequence[str]:
        """Endings of the names of the modules that a new adapter changes, where none are given."""
        return ATTENTION

    @property
    def pipeline_name(self) -> str | None:
        """Name of the pipeline of diffusers that draws with it, if there is one."""
        return None

    def call(self, scale: float) -> dict[str, float | str]:
        """What guidance by a scale is called where the model comes from, and its number there."""
        return {"guidance_scale": scale}

    def at_embedded(self, guidance: float | None) -> "Backbone":
        """The same network, told another number to guide itself by; ``None``: as it is.

        Raises:
            ValueError: if it reads none.
        """
        if guidance is None:
            return self
        raise ValueError(f"a {type(self).__name__} reads no guidance; leave embedded_guidance out")

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, one row each, without gradient."""

    def prepare(self, texts: Sequence[str]) -> None:  # noqa: B027 - a backbone need not prepare
        """Get ready to encode texts that will be needed soon."""

    def read_with(self, reader: "Backbone") -> None:  # noqa: B027 - a backbone may stay with its own encoders
        """Let another backbone encode the texts, so that this one needs no encoders.

        Raises:
            ValueError: if the two do not speak of the same latents and texts.
        """

    @abstractmethod
    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """Return the guided velocity (B, C, H, W), float32, of an adapter, or of the base model for ``None``."""

    def branches(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditional and the unconditional velocity, each (B, C, H, W), float32."""
        return self.velocity(x, sigma, cond, adapter, 1.0), self.velocity(x, sigma, cond, adapter, 0.0)

    @torch.no_grad()
    def velocities(self, x: Tensor, sigma: Tensor, cond: Conditioning, questions: Sequence[Question]) -> list[Tensor]:
        """Return the guided velocities (rows, C, H, W) of every question, float32, without gradient."""
        found = []
        for adapter, scale, rows in questions:
            where = picks(rows, x.device)
            found.append(self.velocity(x[where], sigma[where], cond[rows], adapter, scale))
        return found

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided velocity (B, C, H, W) of two branches of its shape."""
        return guided(conditional, unconditional, scale)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], float32, without gradient."""
