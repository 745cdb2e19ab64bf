"""Qwen-Image over diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from typing_extensions import override

from flowopd.core.tensors import sent
from flowopd.models.adapters.lora import ATTENTION
from flowopd.models.packing import packed, unpacked
from flowopd.models.pipeline import DiffusersBackbone
from flowopd.records import Conditioning


class QwenImageBackbone(DiffusersBackbone):
    """A ``QwenImagePipeline`` as a backbone of velocities; all is said by ``DiffusersBackbone``.

    Its guidance gives every image token of the guided velocity the norm of the conditional one. The pipeline draws
    without guidance where it is given no negative prompt.
    """

    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    autoencoder_class = AutoencoderKLQwenImage
    encoders: ClassVar = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
    speaks = ("in_channels", "joint_attention_dim")
    drawn_at: ClassVar = {"Qwen-Image": 4.0, "Qwen-Image-2512": 4.0}

    @override
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Each text alone: the pipeline pads to the longest of a batch, and padding changes the last bits."""
        options = {"max_sequence_length": self.max_sequence_length, "device": device}
        alone = {text: pipeline.encode_prompt(prompt=[text], **options)[0][0] for text in dict.fromkeys(texts)}
        return Conditioning.ragged([alone[text] for text in texts])

    @override
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        """Image tokens of 2 x 2 latents, and where they are; a mask only where there is padding."""
        rows, length, (height, width) = len(x), cond.tokens.shape[1], x.shape[-2:]
        mask = cond.mask if min(cond.lengths()) < length else None
        return {
            "hidden_states": packed(x.to(self.dtype)),
            "timestep": sigma,
            "encoder_hidden_states": cond.tokens.to(self.dtype),
            "encoder_hidden_states_mask": None if mask is None else sent(mask, x.device),
            "img_shapes": [[(1, height // 2, width // 2)]] * rows,
        }

    @override
    def velocity_from(self, output: Any, x: Tensor) -> Tensor:
        return unpacked(output[0], *x.shape[-2:])

    @override
    def packed(self, x: Tensor) -> Tensor:
        return packed(x)

    @override
    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guided, with the norm that every token of 2 x 2 latents has in the conditional velocity."""
        velocity = super().guide(conditional, unconditional, scale)
        if scale in (0, 1):
            return velocity
        conditional_norm, norm = (packed(v).norm(dim=-1, keepdim=True) for v in (conditional, velocity))
        return unpacked(packed(velocity) * (conditional_norm / norm), *velocity.shape[-2:])

    @override
    def pixels(self, autoencoder: Any, latents: Tensor) -> Tensor:
        """The only frame of a clip; every channel has a mean and a width of its own."""
        mean, std = (
            latents.new_tensor(numbers)[:, None, None]
            for numbers in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
        )
        images: Tensor = autoencoder.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0]
        return images[:, :, 0]

    @override
    def unread(self, transformer: Mapping[str, Any]) -> Any:
        network = super().unread(transformer)
        network.pos_embed = QwenEmbedRope(10000, list(network.config.axes_dims_rope), scale_rope=True)  # no buffers
        return network

    @override
    def channels(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["in_channels"]) // 4

    @override
    def pixels_per_latent(self, autoencoder: Mapping[str, Any]) -> int:
        return int(2 ** len(autoencoder["temperal_downsample"]))

    @override
    def changed(self, transformer: Mapping[str, Any]) -> Sequence[str]:
        """Every attention projection, but what the last block makes of the text: nothing reads it."""
        blocks = range(int(transformer["num_layers"]) - 1)
        text = [f"transformer_blocks.{block}.attn.to_add_out" for block in blocks]
        return [*(name for name in ATTENTION if name != "attn.to_add_out"), *text]

    @override
    def call(self, scale: float) -> dict[str, float | str]:
        return {"true_cfg_scale": scale, "negative_prompt": self.negative_prompt}

    @override
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.max_sequence_length, config["transformer"]["joint_attention_dim"])}
