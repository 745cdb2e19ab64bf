"""What every model of diffusers has in common as a backbone; a family of models says only what differs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from typing_extensions import override

from flowopd.core.ranges import at_least, within
from flowopd.core.schedules import FlowSchedule, Schedule
from flowopd.core.tensors import picks
from flowopd.models.adapters.lora import ATTENTION, mixes_rows, use_adapter, use_adapters
from flowopd.models.backbone import Backbone, Question
from flowopd.models.files import ModelFiles, reading
from flowopd.models.quantized import Bits, encoders_config, transformer_config
from flowopd.models.textcache import TextFolder, TextKey, TextMemory
from flowopd.models.texts import TextEncoders
from flowopd.records import Conditioning

GB = 10**9
DECODED_PIXELS = 8 * 512**2
"""Pixels that are decoded at once: an autoencoder takes 50 times the memory of what it answers."""
MU = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


class DiffusersBackbone(Backbone):
    """A pipeline of diffusers as a backbone of velocities; subclasses name its classes and say how it is called.

    The transformer is frozen and carries all adapters. Text encoders are read when a text is missing, and released
    when it is encoded; the autoencoder is read when something is decoded.

    Args:
        path: a pipeline folder, or a model id of the hub. A folder of the transformer alone is enough for a
            ``FullTeacher``.
        revision: branch, tag or commit on the hub.
        dtype: precision of the frozen transformer and of the encoders; adapters are float32 in any case.
        resolution: image side in pixels, or height and width; default: the model's own.
        max_sequence_length: text tokens at most; default: the family's.
        negative_prompt: the text of the unconditional half of guidance.
        text_cache: folder that keeps encodings for the next run, which then reads no text encoder; one per model.
        text_cache_gb: its largest size, 10⁹ bytes.
        text_memory_gb: largest size of the encodings kept in memory, 10⁹ bytes.
        keep_encoders: keep the text encoders once they are read; default: if they take less than 256 MB.
        activation_checkpointing: compute a block's activations again at backward instead of keeping them.
        guidance_scale: at which the model by itself is meant to be drawn, for its row of tables; default: that of its
            model card, as far as ``path`` tells which model it is (4.5 for Stable Diffusion 3.5 Medium).
        quantize: keep the weights of the transformer's and the encoders' linear layers in fewer bits: ``nf4`` in half a
            byte, by bitsandbytes, on a CUDA device; ``int8`` and ``fp8`` in one, by torchao. They are computed with in
            ``dtype``, and cannot be spread over ranks.

    Raises:
        FileNotFoundError: on ``load``, if ``path`` is neither a pipeline folder nor a reachable model of the hub.
        ValueError: on ``load``, if a file is corrupt or of another kind of model.
    """

    pipeline_class: ClassVar[Any]
    transformer_class: ClassVar[Any]
    autoencoder_class: ClassVar[Any] = AutoencoderKL
    modules: ClassVar[Sequence[str]] = ATTENTION
    """Endings of the names of the modules that a new adapter changes, unless ``changed`` says otherwise."""
    float16: ClassVar[bool] = True
    """Whether float16 is wide enough."""
    encoders: ClassVar[Mapping[str, Any]]
    """Classes of the text encoders, by part."""
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer",)
    speaks: ClassVar[Sequence[str]]
    """What two transformers have in common if one may teach the other: names in their configs."""
    longest_text: ClassVar[int] = 512
    """Text tokens at most, unless told otherwise."""
    side: ClassVar[int] = 1024
    """Image side in pixels, unless told otherwise."""

    drawn_at: ClassVar[Mapping[str, float]] = {}
    """Guidance at which models draw on their model cards, by the name of the model or of a folder around it."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: int | tuple[int, int] | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
        text_cache: str | None = None,
        text_cache_gb: float = 50.0,
        text_memory_gb: float = 8.0,
        keep_encoders: bool | None = None,
        activation_checkpointing: bool = False,
        guidance_scale: float | None = None,
        quantize: Bits | None = None,
    ) -> None:
        if dtype == "float16" and not self.float16:
            raise ValueError(f"a {self.pipeline_name} overflows float16; choose bfloat16 or float32")
        within(0, 512, max_sequence_length=max_sequence_length)
        height, width = resolution if isinstance(resolution, tuple | list) else (resolution, resolution)
        at_least(8, resolution=height, width=width)
        within(0.0, 100.0, guidance_scale=guidance_scale)
        at_least(0.0, text_cache_gb=text_cache_gb, text_memory_gb=text_memory_gb)
        self.path = path
        self.revision = revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.resolution = resolution
        self.max_sequence_length = self.longest_text if max_sequence_length is None else max_sequence_length
        self.negative_prompt = negative_prompt
        self.text_cache = text_cache
        self.text_cache_gb = text_cache_gb
        self.activation_checkpointing = activation_checkpointing
        self.quantize = quantize
        self.guidance_scale = self._known_guidance() if guidance_scale is None else guidance_scale
        self.files = ModelFiles(path, revision, self.pipeline_class.__name__, self.transformer_class.__name__)
        memory = TextMemory(int(text_memory_gb * GB))
        self.texts = TextEncoders(self._read_encoders, self._encode_with, memory, keep_encoders)
        self._network: Any = None
        self._negative: Conditioning | None = None
        self._reader: Backbone | None = None

    # What a family says.

    @abstractmethod
    def rows(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:  # noqa: ANN401
        """Encode B texts by a pipeline that holds the text encoders alone."""

    @abstractmethod
    def inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Any]:
        """What the transformer reads, by name, for states x (B, C, H, W), noise levels σ (B,) and B texts."""

    def velocity_from(self, output: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        """The velocity (B, C, H, W), noise - clean, in what the transformer answers at states x (B, C, H, W)."""
        velocity: Tensor = output[0]
        return velocity

    @override
    def call(self, scale: float) -> dict[str, float | str]:
        negative = {"negative_prompt": self.negative_prompt} if self.negative_prompt else {}
        return {"guidance_scale": scale, **negative}

    def packed(self, x: Tensor) -> Tensor:
        """States (B, C, H, W) as the stock pipeline wants them for its ``latents``."""
        return x

    def pixels(self, autoencoder: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, H, W), in the autoencoder's precision."""
        config = autoencoder.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images: Tensor = autoencoder.decode(latents, return_dict=False)[0]
        return images

    def changed(self, transformer: Mapping[str, Any]) -> Sequence[str]:
        """Endings of the names of the modules that a new adapter changes, by the transformer's config."""
        return self.modules

    def unread(self, transformer: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """The transformer on the meta device, by its config."""
        with torch.device("meta"):
            return self.transformer_class.from_config(transformer)

    def channels(self, transformer: Mapping[str, Any]) -> int:
        """C of a latent, by the transformer's config."""
        return int(transformer["in_channels"])

    def pixels_per_latent(self, autoencoder: Mapping[str, Any]) -> int:
        """Side of what a latent stands for, by the autoencoder's config."""
        return int(2 ** (len(autoencoder["block_out_channels"]) - 1))

    def patch(self, transformer: Mapping[str, Any]) -> int:
        """Side of an image token in latents, by the transformer's config."""
        return 2

    def default_side(self, transformer: Mapping[str, Any], pixels_per_latent: int) -> int:
        """Side of a picture in pixels where none is asked for."""
        return self.side

    def grid(self, scheduler: Mapping[str, Any], latent: tuple[int, int, int]) -> Schedule:
        """The noise levels of the pipeline for latents of a shape (C, H, W), by the scheduler's config.

        Raises:
            ValueError: if the scheduler is of another kind.
        """
        refuse_others(scheduler, self.path)
        if not scheduler.get("use_dynamic_shifting"):
            return FlowSchedule(scheduler["shift"], scheduler.get("shift_terminal"))
        mu = calculate_shift(latent[1] * latent[2] // 4, *(scheduler[name] for name in MU))
        return FlowSchedule(math.exp(mu), scheduler.get("shift_terminal"))

    def set_steps(self, scheduler: Any, num_steps: int, latent: tuple[int, int, int]) -> None:  # noqa: ANN401
        """Ask diffusers' own scheduler for its noise levels, as the pipeline does."""
        mu = calculate_shift(latent[1] * latent[2] // 4, *(scheduler.config[name] for name in MU))
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)

    def reads(self, part: str) -> bool:
        """Whether a text encoder or tokenizer is needed as the backbone was built."""
        return True

    @abstractmethod
    def longest(self, config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of an encoded prompt of the most tokens, without batch, by the configs of all parts."""

    # What all have in common.

    @override
    def schedule(self) -> Schedule:
        return self.grid(self.files.config("scheduler"), self.latent_shape())

    def stock_sigmas(self, num_steps: int) -> Tensor:
        """The levels (num_steps + 1,) of diffusers' own scheduler, to compare a grid with.

        Raises:
            FileNotFoundError: if the model's scheduler is not here.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.files.config("scheduler"))
        self.set_steps(scheduler, num_steps, self.latent_shape())
        levels: Tensor = scheduler.sigmas.cpu()
        return levels

    @property
    @override
    def targets(self) -> Sequence[str]:
        return self.changed(self.network.config)  # type: ignore[arg-type]

    @property
    @override
    def pipeline_name(self) -> str:
        return str(self.pipeline_class.__name__)

    @property
    def identity(self) -> Hashable:
        """The model, its precision and bits, and its negative prompt."""
        return self.path, self.revision, self.dtype, self.quantize, self.negative_prompt

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
        return self.pipeline_class(
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
            autoencoder = self.autoencoder_class.from_pretrained(str(folder), dtype=self.dtype)
        _freeze(autoencoder, self._device())
        return autoencoder

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the transformer onto ``device``; doing it twice is doing it once."""
        if self._network is not None:
            return
        network = self._read_transformer().requires_grad_(False).eval().to(device)
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()
        if self.text_cache is not None:
            folder = Path(self.text_cache)
            self.texts.folder = TextFolder(folder, self._text_key(folder), int(self.text_cache_gb * GB))
        self._network = network

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent."""
        return self.latent_of(self.network.config, self._autoencoder_config)  # type: ignore[arg-type]

    def latent_of(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W) of a latent, by the configs of two parts.

        Raises:
            ValueError: if the resolution does not fill image tokens.
        """
        factor = self.pixels_per_latent(autoencoder)
        unit = factor * self.patch(transformer)
        asked = self.resolution or self.default_side(transformer, factor)
        height, width = asked if isinstance(asked, Sequence) else (asked, asked)
        if height % unit or width % unit:
            raise ValueError(f"resolution is {asked}; expected a multiple of {unit} pixels")
        return self.channels(transformer), height // factor, width // factor

    @cached_property
    def _autoencoder_config(self) -> Mapping[str, Any]:
        return self.files.config("vae")

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, a row each, on the transformer's device; each text once."""
        return (self._reader or self.texts).encode(texts).sent(self._device())

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode texts that will be needed soon, and the negative prompt: the encoders are read once for all."""
        if self._reader is None:
            self.texts.prepare([*texts, self.negative_prompt])

    def read_with(self, reader: Backbone) -> None:
        """Let another backbone encode the texts: this one needs no encoders.

        Raises:
            ValueError: if the two do not speak of the same latents and texts.
        """
        for name in self.speaks:
            ours, theirs = (getattr(getattr(model.network, "config", None), name, None) for model in (self, reader))
            if ours != theirs:
                raise ValueError(f"model {self.path!r} has {name} {ours}, the backbone {theirs}; expected the same")
        self._reader = reader

    def text_parts(self) -> list[str]:
        """Names of the model's text encoders and tokenizers."""
        index = self.files.index()
        return [part for part in (*self.encoders, *self.tokenizers) if index.get(part, [True])[0] is not None]

    def _read_encoders(self) -> dict[str, Any]:
        every, parts = [*self.encoders, *self.tokenizers], [part for part in self.text_parts() if self.reads(part)]
        for part in parts:
            self.files.part(part)
        options: dict[str, Any] = dict.fromkeys({"vae", "scheduler", *every} - set(parts))
        if self.quantize is not None:
            encoders = [part for part in parts if part in self.encoders]
            options["quantization_config"] = encoders_config(self.quantize, self.dtype, encoders)
        with reading(self.files.root):
            pipeline = self.pipeline_class.from_pretrained(
                str(self.files.root), transformer=self.network, dtype=self.dtype, **options
            )
        for part in parts:
            _freeze(getattr(pipeline, part), self._device())
        return {part: getattr(pipeline, part) for part in every}

    def _encode_with(self, parts: Mapping[str, Any], texts: Sequence[str]) -> Conditioning:
        pipeline = self.pipeline_class(transformer=self.network, scheduler=None, vae=None, **parts)
        return self.rows(pipeline, texts, parts["text_encoder"].device)

    def _text_key(self, folder: Path) -> TextKey:
        model = self.files.identity(self.text_parts(), folder / "digests.json")
        precision = f"{self.dtype} {self.quantize}" if self.quantize else str(self.dtype)
        return TextKey(model, self.max_sequence_length, precision)

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
            return self.guide(*self.branches(x, sigma, cond, adapter), guidance_scale)
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

    @torch.no_grad()
    @override
    def velocities(self, x: Tensor, sigma: Tensor, cond: Conditioning, questions: Sequence[Question]) -> list[Tensor]:
        """By one forward, where every adapted layer has the rows as its first axis."""
        if len(questions) == 1 or not mixes_rows(self.network):
            return super().velocities(x, sigma, cond, questions)
        adapters, rows, conds = list[tuple[str | None, int]](), list[int](), list[Conditioning]()
        for adapter, scale, own in questions:
            branches = [cond[own]] if scale != 0 else []
            branches += [self._unconditional().expand(len(own))] if scale != 1 else []
            adapters.append((adapter, len(branches) * len(own)))
            rows += len(branches) * [*own]
            conds += branches
        where = picks(rows, x.device)
        with use_adapters(self.network, adapters):
            answers = self._forward(x[where], sigma[where], Conditioning.cat(conds)).split([n for _, n in adapters])
        return [self._of_branches(answer, scale) for answer, (_, scale, _) in zip(answers, questions, strict=True)]

    def _of_branches(self, answer: Tensor, scale: float) -> Tensor:
        """What one branch answers, or two, one after the other, at a guidance scale."""
        if scale in (0, 1):
            return answer
        conditional, unconditional = answer.chunk(2)
        return self.guide(conditional, unconditional, scale)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        kind = x.device.type
        if not self.float16 and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise ValueError(
                f"a {self.pipeline_name} overflows float16; choose trainer.precision bf16-mixed or 32-true"
            )
        return self.velocity_from(self.network(**self.inputs(x, sigma, cond), return_dict=False), x).float()

    def _unconditional(self) -> Conditioning:
        """The encoded negative prompt, one row, where the transformer is."""
        if self._negative is None or self._negative.tokens.device != self._device():
            self._negative = self.encode([self.negative_prompt])
        return self._negative

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], float32."""
        autoencoder = self.autoencoder
        parts = latents.split(self.decoded_at_once(latents.shape[-2:], autoencoder.config))
        pictures = [self.pixels(autoencoder, part.to(autoencoder.device, autoencoder.dtype)) for part in parts]
        return torch.cat([(picture.float() / 2 + 0.5).clamp(0, 1) for picture in pictures])

    def decoded_at_once(self, sides: Sequence[int], autoencoder: Mapping[str, Any]) -> int:
        """How many latents of some height and width are decoded at once, by the autoencoder's config."""
        pixels = math.prod(sides) * self.pixels_per_latent(autoencoder) ** 2
        return max(1, DECODED_PIXELS // pixels)

    def _known_guidance(self) -> float | None:
        """What the model card says, if a part of the path names a model: ``org/model``, a folder, a hub's cache."""
        names = [name for part in Path(self.path).parts for name in part.split("--")]
        return next((self.drawn_at[name] for name in reversed(names) if name in self.drawn_at), None)

    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _read_transformer(self) -> Any:  # noqa: ANN401
        """Read the transformer of a pipeline, or one that stands alone, strictly.

        Raises:
            ValueError: naming tensors that are missing or too many.
        """
        folder = self.files.part("transformer" if self.files.index() else "")
        bits = self.quantize and transformer_config(self.quantize, self.dtype)
        with reading(folder):
            network, info = self.transformer_class.from_pretrained(
                str(folder), dtype=self.dtype, quantization_config=bits, output_loading_info=True
            )
        faults = (("lacks", info["missing_keys"]), ("has, besides what belongs to it,", info["unexpected_keys"]))
        for fault, keys in faults:
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(f"transformer {folder} {fault} {sorted(keys)[0]}{more}; copy or download it again")
        return network


def refuse_others(scheduler: Mapping[str, Any], path: str) -> None:
    """Raise unless a scheduler's grid can be said by a shift.

    Raises:
        ValueError: naming what is different.
    """
    kind = scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    said = [name for name in OTHER_GRIDS if scheduler.get(name)]
    if scheduler.get("use_dynamic_shifting") and scheduler.get("time_shift_type", "exponential") != "exponential":
        said.append(f"time_shift_type {scheduler['time_shift_type']}")
    if kind != "FlowMatchEulerDiscreteScheduler" or said:
        raise ValueError(
            f"model {path!r} has a {' with '.join([kind, *said])}, whose grid is not known here; "
            "give the sampler a schedule"
        )


def _freeze(part: Any, device: torch.device) -> None:  # noqa: ANN401
    if isinstance(part, nn.Module):
        part.requires_grad_(False).eval().to(device)
