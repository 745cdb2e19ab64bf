"""HPS-v2.1: human preference of whole pictures, by a CLIP ViT-H/14 trained on ranked images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.clip import CLIP, padded, read_clip
from flowopd.rewards.model import ModelReward, Precision, weights_file

NETWORK = "xswu/HPSv2"


class HPSv2(ModelReward):
    """How well people would rank an image for its prompt,  r = cos(image, text).

    Without a temperature, about 0.3 for a good image. The part ``paper`` is the same number; HPS's own tables
    multiply it by 100. Images that are not square are shown whole, on black, as the published code shows them.

    Args:
        path: folder of the checkpoint, or its id on the hub.
        revision: branch, tag or commit on the hub.
        file: name of the checkpoint; ``HPS_v2_compressed.pt`` is version 2.0.
        architecture: its name in open_clip.
        dtype: what the network computes in; 2.0 GB of weights in half precision, twice that in float32.
        batch_size: images per forward.
        offload: keep the weights on the CPU between uses.

    References:
        Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis
        (Wu et al., 2023).
    """

    weights: ClassVar = {NETWORK: 986_109_441}

    def __init__(
        self,
        path: str = NETWORK,
        revision: str | None = None,
        file: str = "HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        dtype: Precision = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        self.path = path
        self.revision = revision
        self.file = file
        self.architecture = architecture
        self._clip: CLIP

    def read(self) -> None:
        """Read the network; ``state_dict`` of the checkpoint is what open_clip looks for.

        Raises:
            FileNotFoundError: if the checkpoint is not there.
            ValueError: if it cannot be read as this architecture.
        """
        source = f"`hf download xswu/HPSv2 {self.file}` gets it and prints where it is"
        file = weights_file(self.path, self.file, self.revision, source)
        self._clip = read_clip(self.architecture, file, self.dtype, pretrained=str(file))

    def networks(self) -> Iterable[nn.Module]:
        """The CLIP."""
        return [self._clip]

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Each image with its own prompt."""
        seen = self._clip.images(padded(images, self._clip.size))
        cosine = (seen * self._clip.texts([prompt.text for prompt in prompts])).sum(dim=-1)
        return Scores(cosine, {"paper": cosine})
