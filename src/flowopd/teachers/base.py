"""The Teacher protocol, and its three kinds: an adapter, the base itself, a second model."""

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.models import Backbone
from flowopd.models.adapters.lora import Adapter, adapter_names, attach, read_adapter
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
    """A LoRA adapter in peft layout on the shared backbone.

    Args:
        path: adapter folder, or a model id of the hub.
        subfolder: folder inside ``path``.
        revision: branch, tag or commit on the hub.
        guidance_scale: the teacher's own guidance; 1 for none.
    """

    def __init__(
        self, path: str, subfolder: str | None = None, revision: str | None = None, guidance_scale: float = 1.0
    ) -> None:
        self.path = path
        self.subfolder = subfolder
        self.revision = revision
        self.guidance_scale = guidance_scale
        self._backbone: Backbone | None = None
        self._name = ""
        self._fingerprint = ""

    def attach(self, backbone: Backbone) -> None:
        """Put the adapter on the backbone; the same adapter is carried once.

        Raises:
            FileNotFoundError: if the folder is missing.
            ValueError: if tensors are missing, extra or mis-shaped, or the adapter changes nothing.
        """
        adapter = read_adapter(self.path, self.subfolder, self.revision)
        _check_changes_something(adapter, self.path)
        self._backbone, self._fingerprint = backbone, adapter.fingerprint()
        self._name = f"teacher-{self._fingerprint}"
        if self._name not in adapter_names(backbone.network):
            _attach_named(backbone, self._name, adapter, self.path)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, C, H, W)."""
        assert self._backbone is not None, "attach the teacher first"
        return self._backbone.velocity(x, sigma, cond, self._name, self.guidance_scale)

    def fingerprint(self) -> str:
        """A digest of the adapter's tensors and scale."""
        return self._fingerprint


class BaseTeacher:
    """The backbone without any adapter: the reference policy of GRPO's KL.

    Args:
        guidance_scale: guidance; 1 for none.
    """

    def __init__(self, guidance_scale: float = 1.0) -> None:
        self.guidance_scale = guidance_scale
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


class FullTeacher:
    """A fully fine-tuned model of its own, with the text encodings of the shared backbone.

    Args:
        backbone: the second model: a pipeline, or a folder of its transformer alone. Its text encoders and its
            autoencoder are never read; its ``negative_prompt`` is its own.
        guidance_scale: the teacher's own guidance; 1 for none.
        device: where it lives, such as ``cuda:1`` or ``cpu``; default: beside the shared backbone. States go there, and
            velocities come back.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float = 1.0, device: str | None = None) -> None:
        self.backbone = backbone
        self.guidance_scale = guidance_scale
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


def _check_changes_something(adapter: Adapter, path: str) -> None:
    if not any(bool(value.any()) for key, value in adapter.tensors.items() if "lora_B" in key):
        raise ValueError(
            f"teacher {path!r} changes nothing: all of its B factors are zero, so it equals the base model"
        )


def _attach_named(backbone: Backbone, name: str, adapter: Adapter, path: str) -> None:
    try:
        attach(backbone.network, name, adapter)
    except ValueError as error:
        raise ValueError(f"teacher {path!r}: {error}") from error
