"""Z-Image over diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model
from typing_extensions import override

from flowopd.models.pipeline import DiffusersBackbone
from flowopd.records import Conditioning


class ZImageBackbone(DiffusersBackbone):
    """A ``ZImagePipeline`` (Z-Image, and its Turbo) as a backbone of velocities; all is said by ``DiffusersBackbone``.

    Its pipeline calls s - 1 the guidance scale. Activations reach 344 064, so float16 is refused.
    """

    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    encoders: ClassVar = {"text_encoder": Qwen3Model}
    speaks = ("in_channels", "cap_feat_dim")
    drawn_at: ClassVar = {"Z-Image": 5.0, "Z-Image-Turbo": 1.0}
    modules = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    float16 = False

    @override
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        encoded, _ = pipeline.encode_prompt(
            prompt=list(texts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        return Conditioning.ragged(encoded)

    @override
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        """Lists of pictures (C, 1, H, W) and of texts (L, D) without padding; time runs from noise to picture."""
        tokens = cond.tokens.to(self.dtype)
        return {
            "x": list(x.to(self.dtype).unsqueeze(2)),
            "t": 1 - sigma,
            "cap_feats": [row[:length] for row, length in zip(tokens, cond.lengths(), strict=True)],
        }

    @override
    def velocity_from(self, output: Any, x: Tensor) -> Tensor:
        return -torch.stack(output[0]).squeeze(2)

    @override
    def call(self, scale: float) -> dict[str, float | str]:
        return super().call(scale) | {"guidance_scale": scale - 1}

    @override
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.max_sequence_length, config["transformer"]["cap_feat_dim"])}
