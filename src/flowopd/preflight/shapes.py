"""Sizes of models that nobody has read: their configs, built on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flowopd.models import AdapterSource, Backbone, LoRASpec, SD3Backbone
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, WEIGHTS, read_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter
from flowopd.records import Conditioning

_SD3 = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "sample_size": 128,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM: Mapping[str, Any] = {
    **_SD3,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
"""Shapes of stabilityai/stable-diffusion-3.5-medium, from its transformer/config.json."""

SD35_LARGE: Mapping[str, Any] = {
    **_SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
"""Shapes of stabilityai/stable-diffusion-3.5-large, from its transformer/config.json."""

_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408}
_AROUND: Mapping[str, Mapping[str, Any]] = {  # the same in every model of the family, from their config.json
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        **_CLIP,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        **_CLIP,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "text_encoder_3": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
KNOWN: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    f"stabilityai/stable-diffusion-3.5-{size}": {"transformer": transformer, **_AROUND}
    for size, transformer in {"medium": SD35_MEDIUM, "large": SD35_LARGE, "large-turbo": SD35_LARGE}.items()
}
"""Configs by part, for planning before anything is downloaded."""


ADAPTER = "student"
ADAPTER_FILES = (WEIGHTS, DIFFUSERS_WEIGHTS)


class Shapes:
    """What a backbone will look like once it is read: from its folder, the hub's cache, or what is known of SD3.5.

    Args:
        backbone: not loaded, and not touched.

    Raises:
        ValueError: if it is of another kind than those whose shapes are known here.
    """

    def __init__(self, backbone: Backbone) -> None:
        if not isinstance(backbone, SD3Backbone):
            raise ValueError(f"a plan needs the shapes of a SD3Backbone, got a {type(backbone).__name__}")
        self.backbone = backbone
        self._adapted: dict[tuple[str, ...], tuple[int, SD3Transformer2DModel]] = {}

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part.

        Raises:
            ValueError: if it is not here and the model is not a known one.
        """
        path = self.backbone.path
        if (file := _find(path, f"{part}/config.json", self.backbone.revision)) is not None:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return content
        if part in KNOWN.get(path, {}):
            return dict(KNOWN[path][part])
        raise ValueError(
            f"{part}/config.json of model {path!r} is not here, and a plan downloads nothing; give a folder, "
            f"or one of {', '.join(KNOWN)}"
        )

    def transformer(self) -> SD3Transformer2DModel:
        """The transformer on the meta device, frozen, in the backbone's precision."""
        with torch.device("meta"):
            network = SD3Transformer2DModel.from_config(self.config("transformer"))
        nn.Module.to(network, self.backbone.dtype)  # diffusers' own would log that nothing has to stay in float32
        return network.requires_grad_(False).eval()

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder on the meta device."""
        with torch.device("meta"):
            network = AutoencoderKL.from_config(self.config("vae"))
        return nn.Module.to(network, self.backbone.dtype)

    @cached_property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        config = self.config("transformer")
        factor = 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        side = (self.backbone.resolution or config["sample_size"] * factor) // factor
        return config["in_channels"], side, side

    def text(self) -> Conditioning:
        """An encoded prompt on the meta device, one row."""
        config = self.config("transformer")
        length = self.config("text_encoder")["max_position_embeddings"] + self.backbone.max_sequence_length
        tokens = torch.empty(1, length, config["joint_attention_dim"], device="meta", dtype=self.backbone.dtype)
        return Conditioning(tokens, tokens.new_empty(1, config["pooled_projection_dim"]))

    def text_bytes(self) -> float:
        """Bytes of an encoded prompt."""
        text = self.text()
        return float(text.tokens.nbytes + text.pooled.nbytes)

    def encoders(self) -> dict[str, float]:
        """Bytes of every text encoder."""
        folder = Path(self.backbone.path)
        has_t5 = not folder.is_dir() or (folder / "text_encoder_3").is_dir()
        with torch.device("meta"):
            clips = ("text_encoder", "text_encoder_2")
            built = {part: CLIPTextModelWithProjection(CLIPTextConfig(**self.config(part))) for part in clips}
            if self.backbone.max_sequence_length and has_t5:
                built["text_encoder_3"] = T5EncoderModel(T5Config(**self.config("text_encoder_3")))
        return {part: parameter_count(network) * self.backbone.dtype.itemsize for part, network in built.items()}

    def adapter_bytes(self, spec: LoRASpec) -> float:
        """Bytes of a float32 adapter, which grow with its rank."""
        rank, network = self._adapted.get(tuple(spec.targets)) or (spec.rank, self.adapted(spec))
        return 4.0 * sum(p.numel() for p in adapter_parameters(network, ADAPTER)) * spec.rank / rank

    def adapted(self, spec: LoRASpec) -> SD3Transformer2DModel:
        """The transformer on the meta device with a new, trainable adapter; the same one if asked again."""
        known = self._adapted.get(tuple(spec.targets))
        if known is not None and known[0] == spec.rank:
            return known[1]
        network = self.transformer()
        with torch.device("meta"):
            add_adapter(network, ADAPTER, spec)
        self._adapted[tuple(spec.targets)] = spec.rank, network
        return network


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


def nbytes(network: nn.Module) -> float:
    """Bytes of all parameters and buffers."""
    return float(sum(t.nbytes for t in (*network.parameters(), *network.buffers())))


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
