"""The Reward protocol."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowopd.records import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores images, higher is better.

    Implementations repeat these annotations exactly: the command line checks them when it parses a config.
    """

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image against its prompt.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts.

        Returns:
            (B,) float32 on the images' device; NaN where scoring failed.
        """
        ...
