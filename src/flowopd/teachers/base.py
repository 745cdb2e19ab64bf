"""The Teacher protocol, and its three kinds: an adapter, the base itself, a second model."""

import copy
import hashlib
from collections.abc import Hashable
from dataclasses import astuple
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from flowopd.core.ranges import within
from flowopd.core.shown import Shown
from flowopd.models import AdapterSource, Backbone
from flowopd.models.adapters.lora import Adapter, adapter_names, attach
from flowopd.records import Conditioning

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""


@runtime_checkable
class Teacher(Protocol):
    """A frozen velocity field to learn from."""

    def attach(self, backbone: Backbone) -> None:
        """Bring the weights to the backbone, before anything wraps or shards it."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W), float32, at states x (B, C, H, W) and σ (B,)."""
        ...

    def fingerprint(self) -> str:
        """A digest of the weights; a resumed run refuses another one."""
        ...


class Asks(NamedTuple):
    """What a teacher asks of a backbone: teachers of one backbone can be answered by one forward."""

    backbone: Backbone
    adapter: str | None
    guidance_scale: float


class LoRATeacher:
    """A LoRA adapter on the shared backbone.

    Args:
        path: adapter folder, a ``.safetensors`` file, or a model id of the hub.
        subfolder: folder or file inside ``path``.
        revision: branch, tag or commit on the hub.
        guidance_scale: the teacher's own guidance; 1 for none. Default: none, with a warning beside a guided student.
        embedded_guidance: the number that a model like FLUX.1 reads to guide itself; default: the backbone's.
        scale: how strong the adapter is used; 1 is as it was saved.
    """

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        revision: str | None = None,
        guidance_scale: float | None = None,
        embedded_guidance: float | None = None,
        scale: float = 1.0,
    ) -> None:
        self.source = AdapterSource(path, subfolder, revision, scale)
        within(0.0, 100.0, guidance_scale=guidance_scale, embedded_guidance=embedded_guidance)
        self.embedded_guidance = embedded_guidance
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self._backbone: Backbone | None = None
        self._name = ""
        self._fingerprint = ""

    def __repr__(self) -> str:
        path, subfolder, revision, scale = astuple(self.source)
        told = "" if self.embedded_guidance is None else f", embedded_guidance={self.embedded_guidance}"
        told += "" if scale == 1 else f", {scale=}"
        return f"LoRATeacher({path=}, {subfolder=}, {revision=}, guidance_scale={self.guidance_scale}{told})"

    def attach(self, backbone: Backbone) -> None:
        """Put the adapter on the backbone; the same adapter is carried once.

        Raises:
            FileNotFoundError: if the folder is missing.
            ValueError: if it is not a plain LoRA, does not fit the backbone, or changes nothing; or if the backbone
                reads no guidance and one is given.
        """
        adapter = self.source.adapter()
        _check_changes_something(adapter, self.source)
        self._backbone, self._fingerprint = backbone.at_embedded(self.embedded_guidance), adapter.fingerprint()
        self._name = f"teacher-{self._fingerprint}"
        if self._name not in adapter_names(backbone.network):
            _attach_named(backbone, self._name, adapter, self.source)

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
        return network_of(self._backbone), self.source, self.guidance_scale, self.embedded_guidance

    def at(self, guidance_scale: float) -> Self:
        """The same teacher, asked with another guidance."""
        twin = copy.copy(self)
        twin.guidance_scale = guidance_scale
        return twin


class BaseTeacher(Shown):
    """The backbone without any adapter: the reference policy of GRPO's KL.

    Args:
        guidance_scale: guidance; 1 for none. Default: none, with a warning beside a guided student.
        embedded_guidance: the number that a model like FLUX.1 reads to guide itself; default: the backbone's.
    """

    def __init__(self, guidance_scale: float | None = None, embedded_guidance: float | None = None) -> None:
        within(0.0, 100.0, guidance_scale=guidance_scale, embedded_guidance=embedded_guidance)
        self.embedded_guidance = embedded_guidance
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self._backbone: Backbone | None = None

    def attach(self, backbone: Backbone) -> None:
        """Remember the backbone.

        Raises:
            ValueError: if it reads no guidance and one is given.
        """
        self._backbone = backbone.at_embedded(self.embedded_guidance)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W)."""
        assert self._backbone is not None, "attach the teacher first"
        return self._backbone.velocity(x, sigma, cond, None, self.guidance_scale)

    @property
    def asks(self) -> Asks:
        """Whom it asks, and what."""
        assert self._backbone is not None, "attach the teacher first"
        return Asks(self._backbone, None, self.guidance_scale)

    def fingerprint(self) -> str:
        """The base has nothing of its own to change."""
        return "base"

    @property
    def identity(self) -> Hashable:
        """Network and guidance: teachers that agree in these are asked once."""
        return network_of(self._backbone), None, self.guidance_scale, self.embedded_guidance

    def at(self, guidance_scale: float) -> Self:
        """The same teacher, asked with another guidance."""
        twin = copy.copy(self)
        twin.guidance_scale = guidance_scale
        return twin


class FullTeacher(Shown):
    """A model of its own, of any size, on the same latents, with the text encodings of the shared backbone.

    Teachers of one model carry it once, each with its own adapter.

    Args:
        backbone: the second model: a pipeline, or a folder of its transformer alone. Its text encoders and its
            autoencoder are never read; its ``negative_prompt`` is its own.
        guidance_scale: the teacher's own guidance; 1 for none. Default: none, with a warning beside a guided student.
        device: where it lives, such as ``cuda:1`` or ``cpu``; default: beside the shared backbone. States go there, and
            velocities come back.
        adapter: a LoRA on it; default: the model as it is, such as one that was fully fine-tuned.
    """

    def __init__(
        self,
        backbone: Backbone,
        guidance_scale: float | None = None,
        device: str | None = None,
        adapter: str | AdapterSource | None = None,
    ) -> None:
        self.backbone = backbone
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self.device = device
        self.adapter = AdapterSource(adapter) if isinstance(adapter, str) else adapter
        self._field = _field(self.adapter, guidance_scale)

    def attach(self, backbone: Backbone) -> None:
        """Read the second model, unless another teacher did, and put the adapter on it.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if a file is corrupt or of another kind of model, the two do not speak of the same latents, or
                the adapter does not fit.
        """
        self.backbone = backbone.companions.setdefault((self.backbone.identity, self.device), self.backbone)
        self.backbone.load(self.device or next(backbone.network.parameters()).device)
        self.backbone.read_with(backbone)
        self._field.attach(self.backbone)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W), where x is."""
        there = next(self.backbone.network.parameters()).device
        return self._field.velocity(x.to(there), sigma.to(there), cond.to(there)).to(x.device)

    def fingerprint(self) -> str:
        """A digest of every parameter's shape and of the sum of its bits, and of the adapter.

        Whole numbers add up to the same on every device, in whatever order.
        """
        digest = hashlib.sha256()
        for key, value in sorted(_own(self.backbone.network).items()):
            bits = value.contiguous().view(BITS[value.element_size()]).sum(dtype=torch.int64)
            digest.update(f"{key} {tuple(value.shape)} {value.dtype} {bits.item()}".encode())
        if self.adapter is not None:
            digest.update(self._field.fingerprint().encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> Hashable:
        """Model, adapter and guidance: teachers that agree in these are asked once."""
        return self.backbone.identity, self.device, self._field.identity

    def at(self, guidance_scale: float) -> Self:
        """The same teacher, asked with another guidance."""
        twin = copy.copy(self)
        twin.guidance_scale, twin._field = guidance_scale, self._field.at(guidance_scale)
        return twin


def _field(adapter: AdapterSource | None, guidance_scale: float | None) -> LoRATeacher | BaseTeacher:
    if adapter is None:
        return BaseTeacher(guidance_scale)
    return LoRATeacher(adapter.path, adapter.subfolder, adapter.revision, guidance_scale, scale=adapter.scale)


def network_of(backbone: Backbone | None) -> int:
    """The network below a backbone, of which several may speak; 0 before a teacher is attached."""
    return 0 if backbone is None else id(backbone.network)


def _own(network: nn.Module) -> dict[str, Tensor]:
    """A network's own tensors, under the names they have without adapters."""
    state = network.state_dict().items()
    return {key.replace(".base_layer.", "."): value for key, value in state if ".lora_" not in key}


def guidance_of(teacher: Teacher) -> float | None:
    """The guidance scale that a teacher is asked with; None if it is not a matter of one number."""
    scale = getattr(teacher, "guidance_scale", None)
    return None if scale is None else float(scale)


def states_guidance(teacher: Teacher) -> bool:
    """Whether the teacher's guidance was chosen, rather than left out."""
    return getattr(teacher, "_states_guidance", True)


def _check_changes_something(adapter: Adapter, source: AdapterSource) -> None:
    if not any(bool(part.folded().b.any()) and bool(part.a.any()) for part in adapter.parts.values()):
        raise ValueError(
            f"teacher {str(source)!r} changes nothing: its factors B, or A, or alpha are zero; it equals the base model"
        )


def _attach_named(backbone: Backbone, name: str, adapter: Adapter, source: AdapterSource) -> None:
    try:
        attach(backbone.network, name, adapter)
    except ValueError as error:
        raise ValueError(f"teacher {str(source)!r}: {error}") from error
