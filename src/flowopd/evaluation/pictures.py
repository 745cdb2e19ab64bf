"""Pictures that people look at first."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def save_png(image: Tensor, path: Path) -> None:
    """Save an image (3, H, W) in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(image)).save(path)


def save_strip(images: Tensor, path: Path) -> None:
    """Save images (B, 3, H, W) in [0, 1] side by side."""
    save_png(torch.cat(list(images), -1), path)


def read_strip(path: Path, count: int) -> Tensor:
    """The images (B, 3, H, W) in [0, 1] that ``save_strip`` saved, B = count, rounded to bytes."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    return torch.stack(pixels.chunk(count, -1)).float() / 255


def contact_sheet(images: Mapping[str, Tensor], captions: Sequence[str], path: Path, side: float = 1.3) -> None:
    """Save a sheet of images: a row per model, a column per prompt.

    Args:
        images: (B, 3, H, W) in [0, 1] of each model.
        captions: B prompts.
        path: a ``.png``.
        side: width of an image, in inches at 110 dpi.
    """
    figure = Figure(figsize=(side * len(captions), (side + 0.1) * len(images) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(images), len(captions), squeeze=False)
    for row, (name, pictures) in zip(axes, images.items(), strict=True):
        row[0].set_ylabel(name, fontsize=8)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(to_uint8(picture), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(_wrapped(caption), fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def prompt_sheet(pictures: Mapping[str, Sequence[tuple[str, Path]]], path: Path, side: float = 1.3) -> None:
    """Save a sheet of pictures: a row per task, every picture below its own prompt.

    Args:
        pictures: prompts and picture files of each task.
        path: a ``.png``.
        side: width of a picture, in inches at 110 dpi.
    """
    most = max(map(len, pictures.values()))
    figure = Figure(figsize=(side * most, (side + 0.45) * len(pictures)), layout="constrained", dpi=110)
    for row, (task, found) in zip(figure.subplots(len(pictures), most, squeeze=False), pictures.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(task, fontsize=8)
        for axis, (text, file) in zip(row, found, strict=False):
            axis.imshow(np.asarray(Image.open(file)), interpolation="nearest")
            axis.set_title(_wrapped(text), fontsize=6)
    figure.savefig(path)


def to_uint8(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as (H, W, 3) of bytes."""
    array: np.ndarray = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return array


def _wrapped(caption: str, width: int = 22) -> str:
    lines = [""]
    for word in caption.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return "\n".join(lines[:3])
