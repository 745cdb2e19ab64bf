"""DeQA: the quality of an image as the expected level, read from the next token's odds of mPLUG-Owl2.

The code published with the weights does not run on current transformers; ``owl2`` is that network in plain torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.deqa.owl2 import Owl2, Sizes
from flowopd.rewards.model import ModelReward, Precision, read_tensors, weights_file

NETWORK = "zhiyuanyou/DeQA-Score-Mix3"
SOURCE = "`hf download zhiyuanyou/DeQA-Score-Mix3` fetches DeQA's weights (16.4 GB)"
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class DeQA(ModelReward):
    """Quality of an image, whatever its prompt:  q = Σ_l p(l) · l,  l from 5 (excellent) to 1 (bad).

    p is the softmax over the five level words as the next token of a question about the image's quality. The score is
    q / 5, in [0.2, 1]; the part ``paper`` is q, as papers report it.

    Args:
        path: folder of the checkpoint, or its id on the hub.
        revision: branch, tag or commit on the hub.
        dtype: what the network computes in; 16.4 GB of weights in half precision.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        Teaching Large Language Models to Regress Accurate Image Quality Scores Using Score Distribution (You et al.,
        2025); mPLUG-Owl2 (Ye et al., 2023).
    """

    weights: ClassVar = {NETWORK: 8_204_550_144}

    def __init__(
        self,
        path: str = NETWORK,
        revision: str | None = None,
        dtype: Precision = "float16",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.path = path
        self.revision = revision

    def read(self) -> None:
        """Read config and weights; raises as ``read_owl2`` does."""
        self.network = read_owl2(self.path, self.revision, self.torch_dtype)

    def networks(self) -> Iterable[nn.Module]:
        """The one network."""
        return [self.network]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of one batch, images (b, 3, H, W) uint8."""
        pixels = preprocess(images, self.network.sizes.vision.image_size).to(self.torch_dtype)
        odds = self.network(pixels).float().softmax(-1)
        quality = (odds * torch.arange(5.0, 0.0, -1.0, device=odds.device)).sum(-1)
        return Scores(quality / 5, {"paper": quality})


def preprocess(images: Tensor, size: int) -> Tensor:
    """Pad to a square with CLIP's mean colour, resize, normalise.

    Args:
        images: (B, 3, H, W) uint8.
        size: side of the square, pixels.

    Returns:
        (B, 3, size, size) float32.
    """
    height, width = images.shape[-2:]
    side = max(height, width)
    colour = torch.tensor([int(255 * c) for c in OPENAI_DATASET_MEAN], dtype=torch.uint8, device=images.device)
    square = colour.view(1, 3, 1, 1).repeat(len(images), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    square = vision.resize(square, [size, size], vision.InterpolationMode.BICUBIC, antialias=True)
    normal: Tensor = vision.normalize(square.float() / 255, list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD))
    return normal


def read_owl2(path: str, revision: str | None = None, dtype: torch.dtype = torch.float16) -> Owl2:
    """Read a checkpoint as published: config.json, and weights in one file or in shards with an index.

    Args:
        path: folder, or id on the hub.
        revision: branch, tag or commit on the hub.
        dtype: of the weights in memory.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ValueError: naming missing, extra or mis-shaped tensors, or a file that cannot be read.
    """
    config = json.loads(weights_file(path, "config.json", revision, SOURCE).read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = Owl2(Sizes.of(config))
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    missing = set(expected)
    for file in _weight_files(path, revision):
        tensors = {name: value for name, value in _tensors(file).items() if not name.endswith("rotary_emb.inv_freq")}
        _check(tensors, expected, path)
        network.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, strict=False, assign=True)
        missing -= set(tensors)
    if missing:
        raise ValueError(f"the DeQA weights in {path!r} lack {_several(missing)}; expected an mPLUG-Owl2 checkpoint")
    return network


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: str) -> None:
    if extra := set(tensors) - set(expected):
        raise ValueError(f"the DeQA weights in {path!r} hold {_several(extra)}, which mPLUG-Owl2 does not have")
    for name, value in tensors.items():
        if value.shape != expected[name]:
            shapes = f"{tuple(value.shape)}, but config.json asks for {tuple(expected[name])}"
            raise ValueError(f"in the DeQA weights in {path!r}, {name} has the shape {shapes}")


def _several(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"


def _weight_files(path: str, revision: str | None) -> Iterator[Path]:
    """One file, or the shards that an index names; safetensors if there is a choice."""
    main = _first(path, revision)
    if main.suffix != ".json":
        yield main
        return
    for shard in sorted(set(json.loads(main.read_text(encoding="utf-8"))["weight_map"].values())):
        yield weights_file(path, shard, revision, SOURCE)


def _first(path: str, revision: str | None) -> Path:
    for name in WEIGHTS:
        with suppress(FileNotFoundError):
            return weights_file(path, name, revision, SOURCE)
    raise FileNotFoundError(f"{path!r} is without {' or '.join(WEIGHTS)}; {SOURCE}")


def _tensors(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors":
        return read_tensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); download it again") from error
