"""Stable Diffusion 3 and 3.5 over diffusers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from flowopd.core.guidance import guided
from flowopd.core.ranges import at_least, within
from flowopd.models.adapters.lora import use_adapter
from flowopd.models.backbone import Backbone
from flowopd.models.files import ModelFiles, reading
from flowopd.models.textcache import TextFolder, TextKey, TextMemory
from flowopd.models.texts import TextEncoders
from flowopd.records import Conditioning

GB = 10**9
CLIP_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
T5_PARTS = ("text_encoder_3", "tokenizer_3")
GUIDANCE = {
    "stable-diffusion-3.5-medium": 4.5,
    "stable-diffusion-3.5-large": 3.5,
    "stable-diffusion-3.5-large-turbo": 1.0,
    "stable-diffusion-3-medium-diffusers": 7.0,
    "tiles": 1.0,
}
"""Guidance at which models draw on their model cards, by the name of the model or of a folder around it."""


class SD3Backbone(Backbone):
    """A ``StableDiffusion3Pipeline`` (Stable Diffusion 3 and 3.5, any size) as a backbone of velocities.

    The transformer is frozen and carries all adapters. Text encoders are read when a text is missing, and released
    when it is encoded; the autoencoder is read when something is decoded.

    Args:
        path: a pipeline folder, or a model id of the hub such as ``stabilityai/stable-diffusion-3.5-medium``. A folder
            of the transformer alone is enough for a ``FullTeacher``.
        revision: branch, tag or commit on the hub.
        dtype: precision of the frozen transformer and of the encoders; adapters are float32 in any case.
        resolution: image side in pixels; default: the model's own.
        max_sequence_length: T5 tokens; 0 leaves them out.
        negative_prompt: the text of the unconditional half of guidance.
        text_cache: folder that keeps encodings for the next run, which then reads no text encoder; one per model.
        text_cache_gb: its largest size, 10⁹ bytes (a prompt of SD3.5 takes 2.7 MB in bfloat16).
        text_memory_gb: largest size of the encodings kept in memory, 10⁹ bytes.
        keep_encoders: keep the text encoders once they are read; default: if they take less than 256 MB.
        activation_checkpointing: compute a block's activations again at backward instead of keeping them.
        guidance_scale: at which the model by itself is meant to be drawn, for its row of tables; default: that of its
            model card, as far as ``path`` tells which model it is (4.5 for Stable Diffusion 3.5 Medium).

    Raises:
        FileNotFoundError: on ``load``, if ``path`` is neither a pipeline folder nor a reachable model of the hub.
        ValueError: on ``load``, if a file is corrupt or of another kind of model.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: int | None = None,
        max_sequence_length: int = 256,
        negative_prompt: str = "",
        text_cache: str | None = None,
        text_cache_gb: float = 50.0,
        text_memory_gb: float = 8.0,
        keep_encoders: bool | None = None,
        activation_checkpointing: bool = False,
        guidance_scale: float | None = None,
    ) -> None:
        within(0, 512, max_sequence_length=max_sequence_length)
        at_least(8, resolution=resolution)
        at_least(0.0, text_cache_gb=text_cache_gb, text_memory_gb=text_memory_gb)
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.path = path
        self.revision = revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.resolution = resolution
        self.max_sequence_length = max_sequence_length
        self.negative_prompt = negative_prompt
        self.text_cache = text_cache
        self.text_cache_gb = text_cache_gb
        self.activation_checkpointing = activation_checkpointing
        self.guidance_scale = _known_guidance(path) if guidance_scale is None else guidance_scale
        self.files = ModelFiles(path, revision)
        memory = TextMemory(int(text_memory_gb * GB))
        self.texts = TextEncoders(self._read_encoders, self._encode_with, memory, keep_encoders)
        self._network: SD3Transformer2DModel | None = None
        self._negative: Conditioning | None = None
        self._reader: Backbone | None = None

    @property
    def identity(self) -> Hashable:
        """The model, its precision, and its negative prompt."""
        return self.path, self.revision, self.dtype, self.negative_prompt

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        if self._network is None:
            raise RuntimeError("the backbone has no weights yet; call load() first")
        return self._network  # type: ignore[no-any-return]

    @cached_property
    def pipeline(self) -> Any:  # noqa: ANN401 - diffusers is untyped
        """The stock diffusers pipeline around this transformer, for notebooks; reads everything, and keeps it."""
        self.texts.keep = True
        return StableDiffusion3Pipeline(
            transformer=self.network,
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(str(self.files.part("scheduler"))),
            vae=self.autoencoder,
            **self.texts.parts(),
        )

    @cached_property
    def autoencoder(self) -> Any:  # noqa: ANN401
        """The autoencoder; read when it is first asked for."""
        folder = self.files.part("vae")
        with reading(folder):
            autoencoder = AutoencoderKL.from_pretrained(str(folder), dtype=self.dtype)
        _freeze(autoencoder, self._device())
        return autoencoder

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the transformer onto ``device``; doing it twice is doing it once."""
        if self._network is not None:
            return
        network = _read_transformer(self.files, self.dtype).requires_grad_(False).eval().to(device)
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()
        if self.text_cache is not None:
            folder = Path(self.text_cache)
            self.texts.folder = TextFolder(folder, self._text_key(folder), int(self.text_cache_gb * GB))
        self._network = network

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent."""
        config: Any = self.network.config
        factor = self._pixels_per_latent
        unit = factor * config.patch_size
        side = self.resolution or config.sample_size * factor
        if side % unit:
            raise ValueError(f"resolution is {side}; expected a multiple of {unit} pixels")
        return config.in_channels, side // factor, side // factor

    @cached_property
    def _pixels_per_latent(self) -> int:
        channels: list[int] = AutoencoderKL.load_config(str(self.files.part("vae")))["block_out_channels"]
        return int(2 ** (len(channels) - 1))

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, (B, L, D) tokens and (B, P) pooled, on the transformer's device; each text once."""
        return (self._reader or self.texts).encode(texts).to(self._device())

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode texts that will be needed soon, and the negative prompt: the encoders are read once for all."""
        if self._reader is None:
            self.texts.prepare([*texts, self.negative_prompt])

    def read_with(self, reader: Backbone) -> None:
        """Let another backbone encode the texts: this one needs no encoders.

        Raises:
            ValueError: if the two do not speak of the same latents and texts.
        """
        for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
            ours, theirs = (getattr(getattr(model.network, "config", None), name, None) for model in (self, reader))
            if ours != theirs:
                raise ValueError(f"model {self.path!r} has {name} {ours}, the backbone {theirs}; expected the same")
        self._reader = reader

    def _read_encoders(self) -> dict[str, Any]:
        parts = [part for part in self._text_parts() if self.max_sequence_length or part not in T5_PARTS]
        for part in parts:
            self.files.part(part)
        absent = dict.fromkeys({"vae", "scheduler", *T5_PARTS} - set(parts))
        with reading(self.files.root):
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(self.files.root), transformer=self.network, dtype=self.dtype, **absent
            )
        for part in parts:
            _freeze(getattr(pipeline, part), self._device())
        return {part: getattr(pipeline, part) for part in (*CLIP_PARTS, *T5_PARTS)}

    def _encode_with(self, parts: Mapping[str, Any], texts: Sequence[str]) -> Conditioning:
        pipeline = StableDiffusion3Pipeline(transformer=self.network, scheduler=None, vae=None, **parts)
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=parts["text_encoder"].device,
        )
        return Conditioning(tokens, pooled)

    def _text_parts(self) -> list[str]:
        """Names of the model's text encoders and tokenizers."""
        t5 = self.files.index().get("text_encoder_3", [None])[0] is not None
        return [*CLIP_PARTS, *(T5_PARTS if t5 else ())]

    def _text_key(self, folder: Path) -> TextKey:
        model = self.files.identity(self._text_parts(), folder / "digests.json")
        return TextKey(model, self.max_sequence_length, str(self.dtype))

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """Return the guided velocity of an adapter, or of the base model for ``None``.

        Args:
            x: (B, C, H, W).
            sigma: (B,) in [0, 1].
            cond: B rows.
            adapter: name of a loaded adapter.
            guidance_scale: s; 1 (conditional) and 0 (unconditional) cost one forward, anything else two.

        Returns:
            (B, C, H, W), float32.
        """
        if guidance_scale not in (0, 1):
            return guided(*self.branches(x, sigma, cond, adapter), guidance_scale)
        branch = cond if guidance_scale == 1 else self._unconditional().expand(len(x))
        with use_adapter(self.network, adapter):
            return self._forward(x, sigma, branch)

    def branches(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditional and the unconditional velocity by one forward of 2B rows."""
        both = Conditioning.cat([cond, self._unconditional().expand(len(x))])
        with use_adapter(self.network, adapter):
            conditional, unconditional = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return conditional, unconditional

    def _forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        velocity: Tensor = self.network(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,  # the only place where a noise level is a timestep
            encoder_hidden_states=cond.tokens.to(self.dtype),
            pooled_projections=cond.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def _unconditional(self) -> Conditioning:
        """The encoded negative prompt, one row, where the transformer is."""
        if self._negative is None or self._negative.tokens.device != self._device():
            self._negative = self.encode([self.negative_prompt])
        return self._negative

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], float32."""
        vae = self.autoencoder
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def _known_guidance(path: str) -> float | None:
    """What the model card says, if a part of the path names a model: ``org/model``, a folder, a hub's cache."""
    names = [name for part in Path(path).parts for name in part.split("--")]
    return next((GUIDANCE[name] for name in reversed(names) if name in GUIDANCE), None)


def _freeze(part: Any, device: torch.device) -> None:  # noqa: ANN401
    if isinstance(part, nn.Module):
        part.requires_grad_(False).eval().to(device)


def _read_transformer(files: ModelFiles, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Read the transformer of a pipeline, or one that stands alone, strictly.

    Raises:
        ValueError: naming tensors that are missing or too many.
    """
    folder = files.part("transformer" if files.index() else "")
    with reading(folder):
        network, info = SD3Transformer2DModel.from_pretrained(str(folder), dtype=dtype, output_loading_info=True)
    for fault, keys in (("lacks", info["missing_keys"]), ("has, besides what belongs to it,", info["unexpected_keys"])):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"transformer {folder} {fault} {sorted(keys)[0]}{more}; copy or download it again")
    return network
