"""Weights over steps: what a squared velocity error is worth at each noise level.

A distance between two velocities at one state is w(σ, σ') · mean (Δv)² over C, H, W. The choice of w decides which
noise levels matter: composition is decided at high σ, texture at low σ.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.dynamics import Transition


@runtime_checkable
class Weighting(Protocol):
    """A weight for each step."""

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        ...


class Uniform:
    """w = 1: the flow-matching distance; on the SD3.5 grid the first five steps carry 56 % of it."""

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return torch.ones_like(step.sigma)


class ODEDistance:
    """w = dt²: the squared distance of the Euler steps."""

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return (step.sigma_next - step.sigma) ** 2


class ExactKL:
    """w = gain² / 2·std²: the KL of the two steps, in nats per latent dimension.

    References:
        Flow-OPD (arXiv 2605.08063): Δt/2 · (σ_t(1 - t)/2t + 1/σ_t)² · ‖Δv‖².
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error.

        Raises:
            ValueError: on a deterministic step, whose KL is infinite.
        """
        if not bool((step.std > 0).all()):
            raise ValueError(
                "the KL of a deterministic step is infinite; add noise to every trained step "
                "or weight steps by Uniform or ODEDistance"
            )
        return step.gain**2 / (2 * step.std**2)


class Released(ExactKL):
    """w = gain² / 2·g² with std² = g²·(-dt): the public Flow-OPD code, which leaves out the factor 1 / (-dt)."""

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return super().weight(step) * (step.sigma - step.sigma_next)


class CleanPicture:
    """w = σ²: the squared distance of the clean pictures that two velocities predict,  x̂ = x - σ · v.

    >>> from flowopd.core import ODE
    >>> x, sigma = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 0.5])
    >>> CleanPicture().weight(ODE().step(x, x, sigma, sigma / 2))
    tensor([1.0000, 0.2500])
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return step.sigma**2
