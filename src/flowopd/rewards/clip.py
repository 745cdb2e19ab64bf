"""CLIP as the rewards read it: pixels, features of length 1, and one copy of OpenAI's in a process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from weakref import WeakValueDictionary

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from flowopd.rewards.model import Precision, weights_file

OPENAI_L14 = "timm/vit_large_patch14_clip_224.openai"
L14_NUMBERS = 427_616_513
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # in half precision, norms stay float32

Resize = Literal["bicubic", "bilinear"]


def cropped(images: Tensor, size: int, resize: Resize = "bicubic") -> Tensor:
    """Short side to ``size``, antialiased, then the middle square.

    Args:
        images: (B, 3, H, W) uint8.
        size: side in pixels.
        resize: what is put between pixels.

    Returns:
        (B, 3, size, size) float32, with CLIP's mean and deviation taken out.
    """
    small = vision.resize(images, [size], interpolation=InterpolationMode(resize), antialias=True)
    return _standard(vision.center_crop(small, [size, size]))


def padded(images: Tensor, size: int) -> Tensor:
    """Long side to ``size``, bicubic with antialiasing, then black on both sides; as ``cropped`` otherwise."""
    height, width = images.shape[-2:]
    small = [max(1, round(side * size / max(height, width))) for side in (height, width)]
    images = vision.resize(images, small, interpolation=InterpolationMode.BICUBIC, antialias=True)
    top, left = ((size - side) // 2 for side in small)
    return _standard(vision.pad(images, [left, top, size - small[1] - left, size - small[0] - top]))


def _standard(images: Tensor) -> Tensor:
    standard: Tensor = vision.normalize(images.float() / 255, list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD))
    return standard


class CLIP(nn.Module):
    """A CLIP of open_clip, with OpenAI's tokenizer.

    Args:
        network: ``encode_image`` and ``encode_text``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    @property
    def size(self) -> int:
        """Side of the pictures it reads, in pixels."""
        size = self.network.visual.image_size
        return int(size[0] if isinstance(size, tuple | list) else size)

    def images(self, pixels: Tensor) -> Tensor:
        """Features of pixels (B, 3, size, size): (B, D) float32, of length 1."""
        return normalize(self.network.encode_image(pixels.to(self.network.visual.conv1.weight)).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, cut after 77 tokens: (B, D) float32, of length 1."""
        tokens = open_clip.tokenize(list(texts), self.network.context_length).to(
            self.network.visual.conv1.weight.device
        )
        return normalize(self.network.encode_text(tokens).float(), dim=-1)


def read_clip(name: str, file: Path, dtype: Precision, **options: Any) -> CLIP:
    """Read a CLIP of open_clip, every tensor of it.

    Args:
        name: its architecture in open_clip, or ``local-dir:<folder>``.
        file: its weights.
        dtype: what it computes in.
        options: of ``open_clip.create_model``.

    Raises:
        ValueError: if the file does not hold them.
    """
    try:
        network = open_clip.create_model(name, precision=PRECISIONS[dtype], require_pretrained=True, **options)
    except Exception as error:  # open_clip and torch raise many kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} cannot be read as the weights of a {name} of open_clip: {reason}") from error
    return CLIP(network)


_SHARED: WeakValueDictionary[tuple[str, str | None, str], CLIP] = WeakValueDictionary()
_LOCK = Lock()


def shared_clip(path: str = OPENAI_L14, revision: str | None = None, dtype: Precision = "float32") -> CLIP:
    """OpenAI's CLIP, the same object for all who ask for the same one, as long as anybody holds it.

    Whatever its config says, it is built with the QuickGELU that OpenAI's weights were trained with.

    Args:
        path: folder in open_clip's layout, or a model id of the hub.
        revision: branch, tag or commit on the hub.
        dtype: what it computes in.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they cannot be read.
    """
    key = (path, revision, dtype)
    with _LOCK:
        clip = _SHARED.get(key)
        if clip is None:
            clip = _SHARED[key] = _read_openai(*key)
        return clip


def _read_openai(path: str, revision: str | None, dtype: Precision) -> CLIP:
    source = f"`hf download {OPENAI_L14} {CONFIG} {WEIGHTS}` gets CLIP's weights and prints where they are"
    folder = weights_file(path, CONFIG, revision, source).parent
    file = weights_file(path, WEIGHTS, revision, source)
    return read_clip(f"local-dir:{folder}", file, dtype, force_quick_gelu=True)
