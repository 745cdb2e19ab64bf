"""Cheap figures of pictures that tell when a policy cheats its rewards: pictures go dark, edges vanish, colours die.

None of them is a goal; each is compared with its value at the start of training.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

DARK = 0.15
"""Luma below which a pixel is dark."""

EDGE = 0.1
"""Step of luma between neighbours above which a pixel lies on an edge."""

COLOUR_LEVELS = 8
"""Levels per channel of the colour histogram."""


def luma(images: Tensor) -> Tensor:
    """Brightness as the eye weighs it,  Y = 0.299 R + 0.587 G + 0.114 B,  (B, H, W) of images (B, 3, H, W) in [0, 1].

    References:
        ITU-R BT.601.
    """
    weights = images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)
    return torch.einsum("bchw,c->bhw", images.float(), weights)


def dark_fraction(images: Tensor) -> Tensor:
    """Share of dark pixels,  mean [Y < 0.15],  (B,) in [0, 1]."""
    return (luma(images) < DARK).float().mean((1, 2))


def edge_density(images: Tensor) -> Tensor:
    """Share of pixels on an edge,  mean [max(|Y→ - Y|, |Y↓ - Y|) > 0.1],  (B,) in [0, 1]; → and ↓ are neighbours."""
    y = luma(images)
    right = (y[:, :-1, 1:] - y[:, :-1, :-1]).abs()
    below = (y[:, 1:, :-1] - y[:, :-1, :-1]).abs()
    return (torch.maximum(right, below) > EDGE).float().mean((1, 2))


def colour_entropy(images: Tensor) -> Tensor:
    """Entropy of the colours,  -Σ p log₂ p  over a histogram of 8 x 8 x 8 colours,  (B,), bits, at most 9."""
    levels = (images.float() * COLOUR_LEVELS).long().clamp(0, COLOUR_LEVELS - 1)
    colour = (levels[:, 0] * COLOUR_LEVELS + levels[:, 1]) * COLOUR_LEVELS + levels[:, 2]
    pixels = colour.flatten(1)
    counts = pixels.new_zeros(len(pixels), COLOUR_LEVELS**3).scatter_add_(1, pixels, torch.ones_like(pixels))
    share = counts.float() / counts.sum(1, keepdim=True)
    return -torch.xlogy(share, share).sum(1) / torch.log(share.new_tensor(2.0))


def sharpness(images: Tensor) -> Tensor:
    """Energy of the finest detail,  mean (ΔY)²,  (B,); Δ is the five-point Laplacian inside the picture."""
    y = luma(images)[:, None]
    kernel = y.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(y, kernel).square().mean((1, 2, 3))


def diversity(images: Tensor) -> Tensor:
    """How much pictures differ from one another,  mean_{CHW} std_b,  a scalar; 0 if all are one picture."""
    return images.float().std(0, correction=0).mean()


def drift_figures(images: Tensor) -> dict[str, float]:
    """Every figure of this page, averaged over B images (B, 3, H, W) in [0, 1]."""
    each = {
        function.__name__: function(images) for function in (dark_fraction, edge_density, colour_entropy, sharpness)
    }
    figures = {name: value.mean() for name, value in each.items()} | {"diversity": diversity(images)}
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))  # one wait for the device


def drift_changes(now: Mapping[str, float], start: Mapping[str, float]) -> dict[str, float]:
    """Figures against their values at the start: now / start - 1, and for the dark fraction now - start.

    A dark fraction often starts at 0, where a quotient says nothing.

    >>> drift_changes({"sharpness": 0.5, "dark_fraction": 0.3}, {"sharpness": 1.0, "dark_fraction": 0.0})
    {'sharpness': -0.5, 'dark_fraction': 0.3}
    """
    changes = {name: value / max(start[name], 1e-8) - 1 for name, value in now.items()}
    if "dark_fraction" in now:
        changes["dark_fraction"] = now["dark_fraction"] - start["dark_fraction"]
    return changes
