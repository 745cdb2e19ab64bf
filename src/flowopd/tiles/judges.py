"""A judge of tiles that nobody is trained on: a second reader, of shapes instead of colours."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowopd.records import Prompt
from flowopd.tiles.glyphs import PALETTE, SIZE, bitmaps, cut

INK = 0.33
"""RGB distance from the background beyond which there is ink: half of what two colours of the palette are apart."""


class Legibility:
    """How much what is drawn looks like glyphs,  r = mean over tiles with ink of  max_g |ink and g| / |ink or g|.

    Reads neither the prompt nor colours, and is strict where the rewards forgive: they take the nearest glyph, so that
    half of one may pass; here a tile of exact shape scores 1, and a smear about a half. A picture without ink scores 0.
    """

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image, whatever was asked: (B,) in [0, 1]."""
        if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(prompts):
            expected = (len(prompts), 3, SIZE, SIZE)
            raise ValueError(f"expected images of shape {expected}, one per prompt, got {tuple(images.shape)}")
        pixels = cut(images.float().nan_to_num())
        background = PALETTE[0].to(pixels).view(3, 1, 1)
        ink = ((pixels - background).square().sum(2).sqrt() > INK).flatten(2).float()
        glyphs = bitmaps().to(ink.device).flatten(1).float()
        both, either = ink @ glyphs.T, torch.maximum(ink[:, :, None], glyphs).sum(-1)
        drawn = ink.any(-1)
        likeness = (both / either).amax(-1) * drawn
        return likeness.sum(1) / drawn.sum(1).clamp(min=1)
