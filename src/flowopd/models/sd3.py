"""Stable Diffusion 3 and 3.5 over diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from typing_extensions import override

from flowopd.core.schedules import Schedule, ShiftedSchedule
from flowopd.models.pipeline import DiffusersBackbone, refuse_others
from flowopd.records import Conditioning


class SD3Backbone(DiffusersBackbone):
    """A ``StableDiffusion3Pipeline`` (Stable Diffusion 3 and 3.5, any size) as a backbone of velocities.

    A prompt of SD3.5 takes 2.7 MB in bfloat16. ``max_sequence_length`` counts T5's tokens; 0 leaves them out. All else
    is said by ``DiffusersBackbone``.
    """

    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    encoders: ClassVar = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    speaks = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    longest_text = 256
    drawn_at: ClassVar = {
        "stable-diffusion-3.5-medium": 4.5,
        "stable-diffusion-3.5-large": 3.5,
        "stable-diffusion-3.5-large-turbo": 1.0,
        "stable-diffusion-3-medium-diffusers": 7.0,
        "tiles": 1.0,
    }

    @override
    def reads(self, part: str) -> bool:
        return bool(self.max_sequence_length) or part not in ("text_encoder_3", "tokenizer_3")

    @override
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        return Conditioning(tokens, pooled)

    @override
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        assert cond.pooled is not None
        return {
            "hidden_states": x.to(self.dtype),
            "timestep": sigma * 1000,
            "encoder_hidden_states": cond.tokens.to(self.dtype),
            "pooled_projections": cond.pooled.to(self.dtype),
        }

    @override
    def grid(self, scheduler: Mapping[str, Any], latent: tuple[int, int, int]) -> Schedule:
        refuse_others(scheduler, self.path)
        if scheduler.get("use_dynamic_shifting") or scheduler.get("shift_terminal"):
            raise ValueError(f"model {self.path!r} has no constant shift; give the sampler a schedule")
        return ShiftedSchedule(scheduler["shift"], scheduler["num_train_timesteps"])

    @override
    def set_steps(self, scheduler: Any, num_steps: int, latent: tuple[int, int, int]) -> None:
        scheduler.set_timesteps(num_steps)

    @override
    def patch(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer.get("patch_size", 2))

    @override
    def default_side(self, transformer: Mapping[str, Any], pixels_per_latent: int) -> int:
        return int(transformer["sample_size"]) * pixels_per_latent

    @override
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        length = config["text_encoder"]["max_position_embeddings"] + self.max_sequence_length
        transformer = config["transformer"]
        return {
            "tokens": (length, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }
