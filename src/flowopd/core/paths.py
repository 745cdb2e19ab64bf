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
    """
    sigma = expand_like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_from(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path,  v = dx/dσ = noise - clean, (B, C, H, W)."""
    return noise - clean


def clean_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data end of the path through x,  clean = x - σ · v, (B, C, H, W)."""
    return x - expand_like(sigma, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise end of the path through x,  noise = x + (1 - σ) · v, (B, C, H, W)."""
    return x + (1 - expand_like(sigma, x)) * velocity
