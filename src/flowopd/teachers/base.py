"""The Teacher protocol, and its three kinds: an adapter, the base itself, a second model."""

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.ranges import within
from flowopd.core.shown import Shown
from flowopd.models import AdapterSource, Backbone
from flowopd.models.adapters.lora import Adapter, adapter_names, attach
from flowopd.records import Conditioning


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


class LoRATeacher:
    """A LoRA adapter on the shared backbone.

    Args:
        path: adapter folder, a ``.safetensors`` file, or a model id of the hub.
        subfolder: folder or file inside ``path``.
        revision: branch, tag or commit on the hub.
        guidance_scale: the teacher's own guidance; 1 for none. Default: none, with a warning beside a guided student.
    """

    def __init__(
        self, path: str, subfolder: str | None = None, revision: str | None = None, guidance_scale: float | None = None
    ) -> None:
        self.source = AdapterSource(path, subfolder, revision)
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self._backbone: Backbone | None = None
        self._name = ""
        self._fingerprint = ""

    def __repr__(self) -> str:
        path, subfolder, revision = self.source.path, self.source.subfolder, self.source.revision
        return f"LoRATeacher({path=}, {subfolder=}, {revision=}, guidance_scale={self.guidance_scale})"

    def attach(self, backbone: Backbone) -> None:
        """Put the adapter on the backbone; the same adapter is carried once.

        Raises:
            FileNotFoundError: if the folder is missing.
            ValueError: if it is not a plain LoRA, does not fit the backbone, or changes nothing.
        """
        adapter = self.source.adapter()
        _check_changes_something(adapter, self.source)
        self._backbone, self._fingerprint = backbone, adapter.fingerprint()
        self._name = f"teacher-{self._fingerprint}"
        if self._name not in adapter_names(backbone.network):
            _attach_named(backbone, self._name, adapter, self.source)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W)."""
        assert self._backbone is not None, "attach the teacher first"
        return self._backbone.velocity(x, sigma, cond, self._name, self.guidance_scale)

    def fingerprint(self) -> str:
        """A digest of what the adapter changes."""
        return self._fingerprint


class BaseTeacher(Shown):
    """The backbone without any adapter: the reference policy of GRPO's KL.

    Args:
        guidance_scale: guidance; 1 for none. Default: none, with a warning beside a guided student.
    """

    def __init__(self, guidance_scale: float | None = None) -> None:
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self._backbone: Backbone | None = None

    def attach(self, backbone: Backbone) -> None:
        """Remember the backbone."""
        self._backbone = backbone

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W)."""
        assert self._backbone is not None, "attach the teacher first"
        return self._backbone.velocity(x, sigma, cond, None, self.guidance_scale)

    def fingerprint(self) -> str:
        """The base has nothing of its own to change."""
        return "base"


class FullTeacher(Shown):
    """A fully fine-tuned model of its own, with the text encodings of the shared backbone.

    Args:
        backbone: the second model: a pipeline, or a folder of its transformer alone. Its text encoders and its
            autoencoder are never read; its ``negative_prompt`` is its own.
        guidance_scale: the teacher's own guidance; 1 for none. Default: none, with a warning beside a guided student.
        device: where it lives, such as ``cuda:1`` or ``cpu``; default: beside the shared backbone. States go there, and
            velocities come back.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float | None = None, device: str | None = None) -> None:
        self.backbone = backbone
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._states_guidance = guidance_scale is not None
        self.device = device

    def attach(self, backbone: Backbone) -> None:
        """Read the second model.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if a file is corrupt or of another kind of model, or the two do not speak of the same latents.
        """
        self.backbone.load(self.device or next(backbone.network.parameters()).device)
        self.backbone.read_with(backbone)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W), where x is."""
        there = next(self.backbone.network.parameters()).device
        states = x.to(there), sigma.to(there), cond.to(there)
        return self.backbone.velocity(*states, None, self.guidance_scale).to(x.device)

    def fingerprint(self) -> str:
        """A digest of every parameter's sum and shape."""
        digest = hashlib.sha256()
        for key, value in sorted(self.backbone.network.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
        return digest.hexdigest()[:16]


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
