"""The straight path between noise and data, and its conversions.

``sigma`` runs from 1 (noise) to 0 (clean); the network predicts ``velocity = noise - clean``.
"""

from torch import Tensor

from flowopd.core.tensors import expand_like


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Point on the straight path,  x_σ = (1 - σ) · clean + σ · noise.

    Args:
        clean, noise: (B, C, H, W).
        sigma: noise level in [0, 1], (B,).

    References:
        Flow Matching for Generative Modeling (Lipman et al., 2023), the optimal-transport path.

    >>> import torch
    >>> clean, noise = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    >>> interpolate(clean, noise, sigma=torch.tensor([1.0, 0.25])).flatten()
    tensor([1.0000, 0.2500])
    """
    sigma = expand_like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_from(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path,  v = dx/dσ = noise - clean, (B, C, H, W).

    >>> import torch
    >>> velocity_from(clean=torch.tensor([0.5]), noise=torch.tensor([2.0]))
    tensor([1.5000])
    """
    return noise - clean


def clean_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data end of the path through x,  clean = x - σ · v, (B, C, H, W).

    >>> import torch
    >>> x, velocity = torch.full((1, 1, 1, 1), 0.8), torch.ones(1, 1, 1, 1)
    >>> clean_from_velocity(x, velocity, sigma=torch.tensor([0.6])).flatten()
    tensor([0.2000])
    """
    return x - expand_like(sigma, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise end of the path through x,  noise = x + (1 - σ) · v, (B, C, H, W).

    >>> import torch
    >>> x, velocity = torch.full((1, 1, 1, 1), 0.8), torch.ones(1, 1, 1, 1)
    >>> noise_from_velocity(x, velocity, sigma=torch.tensor([0.6])).flatten()
    tensor([1.2000])
    """
    return x + (1 - expand_like(sigma, x)) * velocity
