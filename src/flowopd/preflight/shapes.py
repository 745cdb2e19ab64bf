"""Sizes of models that nobody has read: their configs, built on the meta device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from flowopd.core.schedules import Schedule
from flowopd.models import AdapterSource, Backbone, DiffusersBackbone, LoRASpec
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, WEIGHTS, read_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter
from flowopd.models.files import SCHEDULER_CONFIG
from flowopd.models.quantized import nbytes
from flowopd.preflight.known import KNOWN
from flowopd.records import Conditioning

ADAPTER = "student"
ADAPTER_FILES = (WEIGHTS, DIFFUSERS_WEIGHTS)


class Shapes:
    """What a backbone will look like once it is read: from its folder, the hub's cache, or what is known of it.

    Args:
        backbone: not loaded, and not touched.

    Raises:
        ValueError: if it is of another kind than those whose shapes are known here.
    """

    def __init__(self, backbone: Backbone) -> None:
        if not isinstance(backbone, DiffusersBackbone):
            raise ValueError(f"a plan needs the shapes of a DiffusersBackbone, got a {type(backbone).__name__}")
        self.backbone = backbone
        self._adapted: dict[tuple[str, ...], tuple[int, Any]] = {}

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part.

        Raises:
            ValueError: if it is not here and the model is not a known one.
        """
        path, name = self.backbone.path, SCHEDULER_CONFIG if part == "scheduler" else "config.json"
        if (file := _find(path, f"{part}/{name}", self.backbone.revision)) is not None:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return content
        if part in KNOWN.get(path, {}):
            return dict(KNOWN[path][part])
        raise ValueError(
            f"{part}/{name} of model {path!r} is not here, and a plan downloads nothing; give a folder, "
            f"or one of {', '.join(KNOWN)}"
        )

    def transformer(self) -> Any:  # noqa: ANN401 - diffusers is untyped
        """The transformer on the meta device, frozen, in the backbone's precision."""
        network = self.backbone.unread(self.config("transformer"))
        nn.Module.to(network, self.backbone.dtype)  # diffusers' own would log that nothing has to stay in float32
        return network.requires_grad_(False).eval()

    def autoencoder(self) -> Any:  # noqa: ANN401
        """The autoencoder on the meta device."""
        with torch.device("meta"):
            network = self.backbone.autoencoder_class.from_config(self.config("vae"))
        return nn.Module.to(network, self.backbone.dtype)

    def transformer_bytes(self) -> float:
        """Bytes of the frozen transformer as it will be kept."""
        return nbytes(self.transformer(), self.backbone.quantize)

    @cached_property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.backbone.latent_of(self.config("transformer"), self.config("vae"))

    @property
    def targets(self) -> Sequence[str]:
        """Endings of the names of the modules that a new adapter changes."""
        return self.backbone.changed(self.config("transformer"))

    def schedule(self) -> Schedule:
        """The noise levels that the model is meant for."""
        return self.backbone.grid(self.config("scheduler"), self.latent)

    def text(self, rows: int = 1, device: torch.device | str = "meta") -> Conditioning:
        """Encoded prompts of the most tokens; on another device than meta their numbers are random."""
        shapes = self.backbone.longest({part: self.config(part) for part in ("transformer", "text_encoder")})
        dtype = self.backbone.dtype
        parts = {name: torch.randn(rows, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        return Conditioning(**parts)

    def text_bytes(self) -> float:
        """Bytes of an encoded prompt."""
        return float(sum(part.nbytes for part in self.text().parts().values()))

    def encoders(self) -> dict[str, float]:
        """Bytes of every text encoder that will be read."""
        folder, sizes = Path(self.backbone.path), {}
        for part, kind in self.backbone.encoders.items():
            if not self.backbone.reads(part) or (folder.is_dir() and not (folder / part).is_dir()):
                continue
            with torch.device("meta"):
                network = kind(kind.config_class(**self.config(part)))
            sizes[part] = nbytes(nn.Module.to(network, self.backbone.dtype), self.backbone.quantize)
        return sizes

    def adapter_bytes(self, spec: LoRASpec) -> float:
        """Bytes of a float32 adapter, which grow with its rank."""
        rank, network = self._adapted.get(self._targets(spec)) or (spec.rank, self.adapted(spec))
        return 4.0 * sum(p.numel() for p in adapter_parameters(network, ADAPTER)) * spec.rank / rank

    def adapted(self, spec: LoRASpec) -> Any:  # noqa: ANN401
        """The transformer on the meta device with a new, trainable adapter; the same one if asked again."""
        known = self._adapted.get(self._targets(spec))
        if known is not None and known[0] == spec.rank:
            return known[1]
        network = self.transformer()
        with torch.device("meta"):
            add_adapter(network, ADAPTER, spec, self.targets)
        self._adapted[self._targets(spec)] = spec.rank, network
        return network

    def _targets(self, spec: LoRASpec) -> tuple[str, ...]:
        return tuple(spec.targets or self.targets)


def adapter_spec(source: AdapterSource) -> LoRASpec | None:
    """Shape of a saved adapter, at its largest rank, from its file or the hub's cache; ``None`` if it is not here.

    Raises:
        ValueError: if it is not a plain LoRA.
    """
    inside = (source.subfolder or "").strip("/")
    names = [inside] if inside.endswith(".safetensors") else [f"{inside}/{name}".strip("/") for name in ADAPTER_FILES]
    found = [_find(source.path, name, source.revision) for name in names]
    file = next(filter(None, found), Path(source.path))
    if not file.is_file():
        return None
    parts = read_adapter(str(file)).parts
    return LoRASpec(max(part.rank for part in parts.values()), targets=list(parts))


def parameter_count(network: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(p.numel() for p in network.parameters())


def materialise(network: nn.Module, device: torch.device | str, std: float = 0.02) -> None:
    """Give a network on the meta device memory, and random numbers instead of weights."""
    network.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.normal_(std=std)


def _find(path: str, name: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    cached = try_to_load_from_cache(path, name, revision=revision) if path.count("/") == 1 else None
    return Path(cached) if isinstance(cached, str) else None
