"""One Gaussian, three verbs: what samples a step also scores and compares it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowopd.core.tensors import expand_like, row_mean, same_shape


@dataclass(frozen=True)
class Gaussian:
    """An isotropic Gaussian over latents, N(mean, std² · I), one per row.

    Args:
        mean: (B, C, H, W).
        std: (B,), ≥ 0; 0 makes the row deterministic.

    >>> standard = Gaussian(mean=torch.zeros(2, 1, 1, 1), std=torch.tensor([1.0, 0.0]))  # the second row is sure
    >>> standard.sample(torch.ones(2, 1, 1, 1)).flatten()
    tensor([1., 0.])
    >>> standard.log_prob(torch.zeros(2, 1, 1, 1))
    tensor([-0.9189,  0.0000])
    >>> standard.kl(Gaussian(torch.full((2, 1, 1, 1), 2.0), standard.std))
    tensor([2., inf])
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, for standard normal ``noise`` (B, C, H, W); exactly ``mean`` where std is 0."""
        same_shape(mean=self.mean, noise=noise)
        return self.mean + expand_like(self.std, self.mean) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std²),  (B,), nats per latent dimension (the *mean* over C, H, W, as in Flow-GRPO).

        Deterministic rows (std = 0) have no density and answer 0.
        """
        same_shape(mean=self.mean, x=x)
        std, noisy = self._guarded_std()
        log_density = -row_mean((x - self.mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return torch.where(noisy, log_density, torch.zeros_like(log_density))

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self ‖ other) = log(σ₂/σ₁) + (σ₁² + (μ₁ - μ₂)²) / 2σ₂² - 1/2,  (B,), nats per latent dimension.

        Between steps of one dynamics the widths agree and ‖μ₁ - μ₂‖² / 2σ² is left. Two deterministic rows answer 0
        if their means agree and infinity otherwise.
        """
        same_shape(mean=self.mean, other=other.mean)
        distance = row_mean((self.mean - other.mean) ** 2)
        std, noisy = self._guarded_std()
        std_other, noisy_other = other._guarded_std()
        kl = torch.log(std_other / std) + (std**2 + distance) / (2 * std_other**2) - 0.5
        degenerate = torch.where((distance == 0) & ~noisy & ~noisy_other, 0.0, math.inf).to(kl.dtype)
        return torch.where(noisy & noisy_other, kl, degenerate)

    def _guarded_std(self) -> tuple[Tensor, Tensor]:
        noisy = self.std > 0
        return torch.where(noisy, self.std, torch.ones_like(self.std)), noisy
