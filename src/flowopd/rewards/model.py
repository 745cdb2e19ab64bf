"""Rewards with weights: read on first use, scored in batches, off the accelerator between uses if asked."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flowopd.core.ranges import at_least, one_of
from flowopd.records import Prompt
from flowopd.rewards.base import Reward, Scores, as_bytes
from flowopd.rewards.weighted import Weighted

Precision = Literal["float32", "bfloat16", "float16"]

# Rewards may share a network, and one that scores must not see another one move it off the device.
_ONE_AT_A_TIME = RLock()


class ModelReward(ABC):
    """A frozen network that scores; subclasses read it and run it on one batch.

    Args:
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.
        dtype: what the network computes in.

    Attributes:
        weights: how many numbers the published networks have, by their names on the hub; rewards share what they both
            name.

    Raises:
        ValueError: if one of them is out of range.
    """

    weights: ClassVar[Mapping[str, int]] = {}

    def __init__(self, batch_size: int = 16, offload: bool = False, dtype: Precision = "float32") -> None:
        at_least(1, batch_size=batch_size)
        one_of(Precision, dtype=dtype)
        self.batch_size = batch_size
        self.offload = offload
        self.dtype = dtype
        self._loaded = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the network computes in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @abstractmethod
    def read(self) -> None:
        """Read the weights into memory; called once.

        Raises:
            FileNotFoundError: if they are not there, saying where to get them.
        """

    @abstractmethod
    def networks(self) -> Iterable[nn.Module]:
        """The networks that were read."""

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of one batch, images (b, 3, H, W) uint8, b ≤ ``batch_size``."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights if that has not been done, and bring them to ``device``."""
        if not self._loaded:
            self.read()
            self._loaded = True
        for network in self.networks():
            network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores (B,) on the images' device, batch by batch."""
        images = as_bytes(images, prompts)
        if not len(images):
            return Scores(torch.zeros(0, device=images.device))
        with _ONE_AT_A_TIME:
            self.load(images.device)
            try:
                chunks = [slice(i, i + self.batch_size) for i in range(0, len(images), self.batch_size)]
                return Scores.cat([self.forward(images[chunk], prompts[chunk]) for chunk in chunks])
            finally:
                if self.offload:
                    self.load("cpu")

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device."""
        return self.detail(images, prompts).value


def resident_bytes(rewards: Iterable[Reward]) -> dict[str, int]:
    """Bytes of the published networks that rewards keep on the device, by name and precision; a shared one counts once.

    Terms of a ``Weighted`` count like any other; networks of rewards that ``offload`` do not.
    """
    found: dict[str, int] = {}
    for reward in rewards:
        if isinstance(reward, Weighted):
            found |= resident_bytes(reward.terms.values())
        if isinstance(reward, ModelReward) and not reward.offload:
            size = reward.torch_dtype.itemsize
            found |= {f"{name}, {reward.dtype}": count * size for name, count in reward.weights.items()}
    return found


def weights_file(path: str, name: str, revision: str | None, source: str) -> Path:
    """A file of a folder, or of a model on the hub: fetched on first use, then taken from the hub's cache.

    Args:
        path: a folder, or a model id of the hub.
        name: of the file.
        revision: branch, tag or commit on the hub.
        source: how to get the file, told if it is not there.

    Raises:
        FileNotFoundError: if it is not there.
    """
    from flowopd.models.files import local_file  # brings diffusers along, which reading alone needs

    try:
        return local_file("model", path, name, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {source}") from error


def read_pretrained(kind: Any, path: str, source: str, **options: Any) -> Any:  # noqa: ANN401
    """``kind.from_pretrained``, of transformers.

    Args:
        kind: the class.
        path: a folder, or a model id of the hub.
        source: how to get the files, told if they are not there.
        options: of ``from_pretrained``.

    Raises:
        FileNotFoundError: if they are not there, or cannot be read.
    """
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        from flowopd.models.files import refusal

        files = f"files that {kind.__name__} can read ({type(error).__name__})"
        reason = f"model folder {path!r} is without {files}"
        if not Path(path).is_dir():
            reason = refusal(error, "model", path, options.get("revision"), files)
        raise FileNotFoundError(f"{reason}; {source}") from error


def read_tensors(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, tensors and plain containers only.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises many kinds
        raise ValueError(f"{file} cannot be read ({type(error).__name__}); download it again") from error
    return content


def linear_head(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Published heads are linear layers in a row, x ↦ A_n(… A_1(x)), without activations between them; float32.

    Args:
        tensors: ``layers.<number>.weight`` and ``.bias``; numbers of layers without weights are left out.

    Raises:
        ValueError: if that is not what the tensors are called.
    """
    numbers = sorted(int(key.split(".")[1]) for key in tensors if re.fullmatch(r"layers\.\d+\.weight", key))
    names = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
    if not numbers or names != set(tensors):
        raise ValueError(f"expected a head of layers.<number>.weight and .bias, got {sorted(tensors)[:4]}")
    head = nn.Sequential()
    for number in numbers:
        weight, bias = tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        head.append(layer)
    return head
