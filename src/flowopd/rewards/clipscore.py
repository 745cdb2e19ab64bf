"""CLIPScore: whether an image shows what its prompt says, by OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from flowopd.core.ranges import one_of
from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.clip import CLIP, L14_NUMBERS, OPENAI_L14, Resize, cropped, shared_clip
from flowopd.rewards.model import ModelReward, Precision


class CLIPScore(ModelReward):
    """How near an image and its prompt are in CLIP,  r = s / 30,  s = 100 · cos(image, text).

    The part ``paper`` is s. Rewards that ask for the same CLIP share one copy of it.

    Args:
        clip: folder of OpenAI's CLIP in open_clip's layout, or its id on the hub.
        clip_revision: branch, tag or commit on the hub.
        resize: ``bicubic``, as CLIP was trained and as CLIPScore is defined, or ``bilinear``, as Flow-GRPO's released
            scorer shows it images.
        dtype: what the network computes in; 0.9 GB of weights in half precision, twice that in float32.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al., 2021).
    """

    weights: ClassVar = {OPENAI_L14: L14_NUMBERS}

    def __init__(
        self,
        clip: str = OPENAI_L14,
        clip_revision: str | None = None,
        resize: Resize = "bicubic",
        dtype: Precision = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.clip = clip
        self.clip_revision = clip_revision
        one_of(Resize, resize=resize)
        self.resize = resize
        self._clip: CLIP

    def read(self) -> None:
        """Read the shared CLIP.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it cannot be read.
        """
        self._clip = shared_clip(self.clip, self.clip_revision, self.dtype)

    def networks(self) -> Iterable[nn.Module]:
        """The CLIP."""
        return [self._clip]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Each image with its own prompt."""
        seen = self._clip.images(cropped(images, self._clip.size, self.resize))
        paper = 100 * (seen * self._clip.texts([prompt.text for prompt in prompts])).sum(dim=-1)
        return Scores(paper / 30, {"paper": paper})
