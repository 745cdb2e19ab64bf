"""FLUX.1 and FLUX.2-klein over diffusers."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import CLIPTextModel, Qwen3ForCausalLM, T5EncoderModel
from typing_extensions import override

from flowopd.core.ranges import within
from flowopd.core.schedules import EmpiricalSchedule, Schedule
from flowopd.models.adapters.lora import ATTENTION
from flowopd.models.backbone import Backbone
from flowopd.models.packing import packed, unpacked
from flowopd.models.pipeline import DiffusersBackbone, refuse_others
from flowopd.records import Conditioning


class FluxBackbone(DiffusersBackbone):
    """A ``FluxPipeline`` (FLUX.1) as a backbone of velocities; what is not said here, ``DiffusersBackbone`` says.

    Guidance s is true classifier-free guidance, ``true_cfg_scale`` of the pipeline; 1 is none, as FLUX.1-dev is mostly
    used: it was taught to guide itself by a number that it reads.

    Args:
        path: a pipeline folder, or a model id of the hub.
        embedded_guidance: that number, ``guidance_scale`` of the pipeline; null for models without, such as
            FLUX.1-schnell.
        options: as those of ``DiffusersBackbone``.
    """

    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    tokenizers = ("tokenizer", "tokenizer_2")
    speaks = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    drawn_at: ClassVar = {"FLUX.1-dev": 1.0, "FLUX.1-schnell": 1.0}

    def __init__(self, path: str, embedded_guidance: float | None = 3.5, **options: Any) -> None:
        super().__init__(path, **options)
        within(0.0, 100.0, embedded_guidance=embedded_guidance)
        self.embedded_guidance = embedded_guidance

    @property
    @override
    def identity(self) -> Hashable:
        return super().identity, self.embedded_guidance

    @override
    def at_embedded(self, guidance: float | None) -> Backbone:
        if guidance is None or self.embedded_guidance is None:
            return super().at_embedded(guidance)
        twin = copy.copy(self)
        twin.embedded_guidance = guidance
        return twin

    @override
    def load(self, device: torch.device | str = "cpu") -> None:
        super().load(device)
        self._check(self.network.config)  # type: ignore[arg-type]

    @override
    def unread(self, transformer: Mapping[str, Any]) -> Any:
        self._check(transformer)
        return super().unread(transformer)

    def _check(self, transformer: Mapping[str, Any]) -> None:
        """Raise unless the model is told exactly what it reads."""
        reads = transformer["guidance_embeds"]
        if reads != (self.embedded_guidance is not None):
            raise ValueError(
                f"model {self.path!r} reads {'a' if reads else 'no'} guidance, and embedded_guidance is "
                f"{self.embedded_guidance}; expected {'a number' if reads else 'null'}"
            )

    @override
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=list(texts), max_sequence_length=self.max_sequence_length, device=device
        )
        return Conditioning(tokens, pooled)

    @override
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        """Image tokens of 2 x 2 latents with their places (0, row, column); those of text are all (0, 0, 0)."""
        assert cond.pooled is not None
        sizes = (1, x.shape[2] // 2, x.shape[3] // 2)
        places = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in sizes))
        guidance = None if self.embedded_guidance is None else torch.full_like(sigma, self.embedded_guidance)
        return {
            "hidden_states": packed(x.to(self.dtype)),
            "timestep": sigma,
            "guidance": guidance,
            "encoder_hidden_states": cond.tokens.to(self.dtype),
            "pooled_projections": cond.pooled.to(self.dtype),
            "img_ids": places.float(),
            "txt_ids": sigma.new_zeros(cond.tokens.shape[1], 3),
        }

    @override
    def velocity_from(self, output: Any, x: Tensor) -> Tensor:
        return unpacked(output[0], *x.shape[-2:])

    @override
    def packed(self, x: Tensor) -> Tensor:
        return packed(x)

    @override
    def channels(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["in_channels"]) // 4

    @override
    def call(self, scale: float) -> dict[str, float | str]:
        embedded = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return {"true_cfg_scale": scale, "negative_prompt": self.negative_prompt, **embedded}

    @override
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        transformer = config["transformer"]
        return {
            "tokens": (self.max_sequence_length, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }


class Flux2KleinBackbone(DiffusersBackbone):
    """A ``Flux2KleinPipeline`` (FLUX.2-klein) as a backbone of velocities; all is said by ``DiffusersBackbone``.

    Its latents are those of the autoencoder, 2 x 2 of them in one, normalised: (4·C, H / 16, W / 16). The noise levels
    depend on the number of steps. The pipeline's negative prompt is always empty.
    """

    pipeline_class = Flux2KleinPipeline
    transformer_class = Flux2Transformer2DModel
    autoencoder_class = AutoencoderKLFlux2
    encoders: ClassVar = {"text_encoder": Qwen3ForCausalLM}
    speaks = ("in_channels", "joint_attention_dim")
    drawn_at: ClassVar = {
        f"FLUX.2-klein-{name}": 4.0 if "base" in name else 1.0 for name in ("4B", "base-4B", "9B", "base-9B")
    }
    modules = (*ATTENTION, "attn.to_qkv_mlp_proj")  # the latter in blocks of one stream, which have no other names

    @override
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Of one length: the transformer reads padding too."""
        tokens, _ = pipeline.encode_prompt(
            prompt=list(texts), max_sequence_length=self.max_sequence_length, device=device
        )
        return Conditioning(tokens)

    @override
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        """Places are (0, row, column, 0) of the picture, and (0, 0, 0, n) of the text."""
        image, text = ((1, *x.shape[2:], 1), (1, 1, 1, cond.tokens.shape[1]))
        image_ids, text_ids = (
            torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in sizes)).expand(len(x), -1, -1)
            for sizes in (image, text)
        )
        return {
            "hidden_states": x.to(self.dtype).flatten(2).transpose(1, 2),
            "timestep": sigma,
            "encoder_hidden_states": cond.tokens.to(self.dtype),
            "img_ids": image_ids,
            "txt_ids": text_ids,
        }

    @override
    def velocity_from(self, output: Any, x: Tensor) -> Tensor:
        velocity: Tensor = output[0].transpose(1, 2).reshape(x.shape)
        return velocity

    @override
    def pixels(self, autoencoder: Any, latents: Tensor) -> Tensor:
        """Normalised by running statistics of the autoencoder; 2 x 2 latents in one."""
        mean, variance = autoencoder.bn.running_mean, autoencoder.bn.running_var
        std = torch.sqrt(variance + autoencoder.config.batch_norm_eps)
        latents = latents * std.to(latents)[:, None, None] + mean.to(latents)[:, None, None]
        images: Tensor = autoencoder.decode(torch.pixel_shuffle(latents, 2), return_dict=False)[0]
        return images

    @override
    def pixels_per_latent(self, autoencoder: Mapping[str, Any]) -> int:
        return 2 * super().pixels_per_latent(autoencoder)

    @override
    def patch(self, transformer: Mapping[str, Any]) -> int:
        return 1

    @override
    def grid(self, scheduler: Mapping[str, Any], latent: tuple[int, int, int]) -> Schedule:
        refuse_others(scheduler, self.path)
        if not scheduler.get("use_dynamic_shifting"):
            raise ValueError(f"model {self.path!r} has a constant shift; give the sampler a schedule")
        return EmpiricalSchedule(latent[1] * latent[2])

    @override
    def set_steps(self, scheduler: Any, num_steps: int, latent: tuple[int, int, int]) -> None:
        mu = compute_empirical_mu(latent[1] * latent[2], num_steps)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)

    @override
    def call(self, scale: float) -> dict[str, float | str]:
        return {"guidance_scale": scale}

    @override
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.max_sequence_length, config["transformer"]["joint_attention_dim"])}
