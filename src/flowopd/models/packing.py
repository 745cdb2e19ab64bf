"""Image tokens of 2 x 2 latents, as FLUX.1 and Qwen-Image read them: a permutation, which no mean notices."""

from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """Tokens (B, H·W / 4, 4·C) of latents (B, C, H, W), row by row.

    >>> import torch
    >>> packed(torch.arange(8.0).reshape(1, 1, 2, 4))
    tensor([[[0., 1., 4., 5.],
             [2., 3., 6., 7.]]])
    """
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, H, W) of tokens (B, H·W / 4, 4·C)."""
    patches = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
