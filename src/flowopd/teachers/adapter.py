"""A teacher out of any adapter that can be made: a merge, or the weights in a checkpoint."""

from collections.abc import Hashable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.ranges import within
from flowopd.core.shown import Shown
from flowopd.models import Backbone
from flowopd.models.adapters.lora import Adapter, adapter_names, attach
from flowopd.records import Conditioning
from flowopd.teachers.base import Asks, network_of


@runtime_checkable
class AdapterMaker(Protocol):
    """Whatever an adapter can be read from, or made of: ``Merge``, ``AdapterSource``, ``CheckpointAdapter``."""

    def adapter(self) -> Adapter:
        """Read or make it."""
        ...


class AdapterTeacher(Shown):
    """A made adapter on the shared backbone; ``LoRATeacher`` is the one for a folder, a file or a model of the hub.

    Args:
        source: what the adapter is read from, or made of.
        guidance_scale: guidance; 1 for none. Default: none, with a warning beside a guided student.
        embedded_guidance: the number that a model like FLUX.1 reads to guide itself; default: the backbone's.
    """

    def __init__(
        self, source: AdapterMaker, guidance_scale: float | None = None, embedded_guidance: float | None = None
    ) -> None:
        within(0.0, 100.0, guidance_scale=guidance_scale, embedded_guidance=embedded_guidance)
        self.embedded_guidance = embedded_guidance
        self.source = source
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self._backbone: Backbone | None = None
        self._fingerprint = ""

    def attach(self, backbone: Backbone) -> None:
        """Make the adapter and put it on the backbone; the same adapter is carried once.

        Raises:
            FileNotFoundError: if something that it is made of is missing.
            ValueError: if it cannot be made, or does not fit the backbone; or if the backbone reads no guidance and
                one is given.
        """
        adapter = self.source.adapter()
        self._backbone, self._fingerprint = backbone.at_embedded(self.embedded_guidance), adapter.fingerprint()
        if self._name not in adapter_names(backbone.network):
            attach(backbone.network, self._name, adapter)

    @property
    def _name(self) -> str:
        return f"teacher-{self._fingerprint}"

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W)."""
        assert self._backbone is not None, "attach the teacher first"
        return self._backbone.velocity(x, sigma, cond, self._name, self.guidance_scale)

    @property
    def asks(self) -> Asks:
        """Whom it asks, and what."""
        assert self._backbone is not None, "attach the teacher first"
        return Asks(self._backbone, self._name, self.guidance_scale)

    def fingerprint(self) -> str:
        """A digest of what the adapter changes."""
        return self._fingerprint

    @property
    def identity(self) -> Hashable:
        """Network, adapter and guidance: teachers that agree in these are asked once."""
        return network_of(self._backbone), self._fingerprint, self.guidance_scale, self.embedded_guidance
