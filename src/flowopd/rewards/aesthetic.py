"""Aesthetic score: how people rate the beauty of pictures, by a linear head on OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.clip import CLIP, L14_NUMBERS, OPENAI_L14, cropped, shared_clip
from flowopd.rewards.model import ModelReward, Precision, linear_head, read_tensors, weights_file

HEAD = "camenduru/improved-aesthetic-predictor"
FILE = "sac+logos+ava1-l14-linearMSE.pth"


class Aesthetic(ModelReward):
    """Beauty of an image, whatever its prompt,  r = w · image + b,  on a scale of 1 to 10.

    image is CLIP's feature of length 1; w and b are five published linear layers in a row. The part ``paper`` is the
    same number. Rewards that ask for the same CLIP share one copy of it.

    Args:
        path: folder of the head, or its id on the hub.
        revision: branch, tag or commit of the head on the hub.
        clip: folder of OpenAI's CLIP in open_clip's layout, or its id on the hub.
        clip_revision: branch, tag or commit of it on the hub.
        dtype: what CLIP computes in; 0.9 GB of weights in half precision, twice that in float32.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        LAION-5B: An open large-scale dataset for training next generation image-text models (Schuhmann et al., 2022).
    """

    weights: ClassVar = {OPENAI_L14: L14_NUMBERS, HEAD: 927_969}

    def __init__(
        self,
        path: str = HEAD,
        revision: str | None = None,
        clip: str = OPENAI_L14,
        clip_revision: str | None = None,
        dtype: Precision = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.path = path
        self.revision = revision
        self.clip = clip
        self.clip_revision = clip_revision
        self._clip: CLIP
        self._head: nn.Module

    def read(self) -> None:
        """Read the head, and the shared CLIP.

        Raises:
            FileNotFoundError: if one of them is not there.
            ValueError: if one of them cannot be read.
        """
        source = (
            f"get {FILE} from https://github.com/christophschuhmann/improved-aesthetic-predictor and give its folder"
        )
        self._head = linear_head(read_tensors(weights_file(self.path, FILE, self.revision, source)))
        self._clip = shared_clip(self.clip, self.clip_revision, self.dtype)

    def networks(self) -> Iterable[nn.Module]:
        """The CLIP and the head."""
        return [self._clip, self._head]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """The prompts are not looked at."""
        score: Tensor = self._head(self._clip.images(cropped(images, self._clip.size)))[:, 0]
        return Scores(score, {"paper": score})
