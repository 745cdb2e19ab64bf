"""The colour of a detected object, by CLIP as GenEval asks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flowopd.prompts.geneval import COLOURS
from flowopd.rewards.clip import CLIP, cropped
from flowopd.rewards.geneval.verdicts import Detection

BACKGROUND = 0x99  # grey, where the object is not
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
CROPS_AT_ONCE = 64


class ColorNamer:
    """Names the colour of objects: the one of ten whose captions CLIP finds nearest to the cut-out object.

    argmax over colours of  cos(image, text(colour)),  text(colour) being the mean of three unit caption features.

    Args:
        clip: OpenAI's, which needs QuickGELU.
    """

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self._classes: dict[str, Tensor] = {}

    def names(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]:
        """Colours of ``objects``, each the row of its image and a detection with its mask.

        Args:
            images: (B, 3, H, W) uint8.
            objects: any number.
        """
        batches = [objects[i : i + CROPS_AT_ONCE] for i in range(0, len(objects), CROPS_AT_ONCE)]
        return [name for batch in batches for name in self._names(images, batch)]

    def _names(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]:
        pixels = [cropped(cut_out(images[row], detection)[None], self.clip.size) for row, detection in objects]
        classes = torch.stack([self.classes(detection.label).to(images.device) for _, detection in objects])
        similarity = torch.einsum("nd,ncd->nc", self.clip.images(torch.cat(pixels)), classes)
        return [COLOURS[i] for i in similarity.argmax(1).tolist()]

    def classes(self, label: str) -> Tensor:
        """Unit features of the ten colours of a ``label``, (10, D) float32; computed once."""
        if label not in self._classes:
            captions = [template.format(color=color, label=label) for color in COLOURS for template in TEMPLATES]
            texts = self.clip.texts(captions).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._classes[label] = normalize(texts.mean(1), dim=-1)
        return self._classes[label]


def cut_out(image: Tensor, detection: Detection) -> Tensor:
    """The object on grey, cropped to its box.

    Args:
        image: (3, H, W) uint8.
        detection: with its mask, (H, W) bool.

    Returns:
        (3, height, width) uint8.
    """
    assert detection.mask is not None
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.where(detection.mask, BACKGROUND)[:, top:bottom, left:right]
