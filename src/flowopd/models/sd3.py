"""Stable Diffusion 3 and 3.5 over diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flowopd.core.guidance import guided
from flowopd.models.backbone import Backbone
from flowopd.models.lora import use_adapter
from flowopd.records import Conditioning

TEXTS_AT_ONCE = 8  # always: kernels differ by batch size, and a resumed run must find the same encodings to the bit


class SD3Backbone(Backbone):
    """A ``StableDiffusion3Pipeline`` folder or hub id as a backbone of velocities.

    The transformer is frozen and carries all adapters. Text is encoded once per prompt and kept.

    Args:
        path: a pipeline folder, or a model id of the hub such as ``stabilityai/stable-diffusion-3.5-medium``.
        revision: branch, tag or commit on the hub.
        dtype: precision of the frozen transformer and of the encoders; adapters are float32 in any case.
        resolution: image side in pixels; default: the model's own.
        max_sequence_length: T5 tokens; 0 leaves them out.
        negative_prompt: the text of the unconditional half of guidance.

    Raises:
        FileNotFoundError: on ``load``, if ``path`` is neither a pipeline folder nor a reachable model of the hub.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: int | None = None,
        max_sequence_length: int = 256,
        negative_prompt: str = "",
    ) -> None:
        self.path = path
        self.revision = revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.resolution = resolution
        self.max_sequence_length = max_sequence_length
        self.negative_prompt = negative_prompt
        self._pipeline: Any = None
        self._texts: dict[str, Conditioning] = {}

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.pipeline.transformer  # type: ignore[no-any-return]

    @property
    def pipeline(self) -> Any:  # noqa: ANN401 - diffusers is untyped
        """The stock diffusers pipeline behind this backbone."""
        if self._pipeline is None:
            raise RuntimeError("the backbone has no weights yet; call load() first")
        return self._pipeline

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights onto ``device``; doing it twice is doing it once."""
        if self._pipeline is not None:
            return
        pipeline = _read_pipeline(self.path, self.revision, self.dtype, t5=self.max_sequence_length > 0)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(device)
        self._pipeline = pipeline

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent."""
        pipe = self.pipeline
        side = self.resolution or pipe.default_sample_size * pipe.vae_scale_factor
        if side % (pipe.vae_scale_factor * pipe.patch_size):
            unit = pipe.vae_scale_factor * pipe.patch_size
            raise ValueError(f"resolution is {side}; expected a multiple of {unit} pixels")
        return pipe.transformer.config.in_channels, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, (B, L, D) tokens and (B, P) pooled, on the transformer's device; each text once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for chunk in (missing[i : i + TEXTS_AT_ONCE] for i in range(0, len(missing), TEXTS_AT_ONCE)):
            rows = self._encode([*chunk, *[""] * (TEXTS_AT_ONCE - len(chunk))])
            self._texts.update({text: rows[i : i + 1] for i, text in enumerate(chunk)})
        return Conditioning.cat([self._texts[text] for text in texts]).to(self._device())

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Conditioning:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.pipeline.text_encoder.device,
        )
        return Conditioning(tokens, pooled)

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """Return the guided velocity of an adapter, or of the base model for ``None``.

        Args:
            x: (B, C, H, W).
            sigma: (B,) in [0, 1].
            cond: B rows.
            adapter: name of a loaded adapter.
            guidance_scale: s; 1 costs one forward, anything else two.

        Returns:
            (B, C, H, W), float32.
        """
        with use_adapter(self.network, adapter):
            if guidance_scale == 1:
                return self._forward(x, sigma, cond)
            negative = self.encode([self.negative_prompt]).expand(len(x))
            pair = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), Conditioning.cat([cond, negative]))
            conditional, unconditional = pair.chunk(2)
            return guided(conditional, unconditional, guidance_scale)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        velocity: Tensor = self.network(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,  # the only place where a noise level is a timestep
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], float32."""
        vae = self.pipeline.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def _read_pipeline(path: str, revision: str | None, dtype: torch.dtype, t5: bool) -> Any:  # noqa: ANN401
    folder = Path(path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} has no model_index.json; expected a StableDiffusion3Pipeline folder")
    try:
        parts = StableDiffusion3Pipeline.load_config(path, revision=revision)
        t5_parts = ("text_encoder_3", "tokenizer_3")
        absent = {name: None for name in t5_parts if not t5 or parts.get(name, [None])[0] is None}
        return StableDiffusion3Pipeline.from_pretrained(path, revision=revision, dtype=dtype, **absent)
    except OSError as error:
        raise FileNotFoundError(
            f"no pipeline folder or reachable model of the hub at {path!r}; check the path, or log in to the hub "
            f"if the model is gated ({type(error).__name__})"
        ) from error
