"""Weights over steps: what a squared velocity error is worth at each noise level.

A distance between two velocities at one state is w(σ, σ') · mean (Δv)² over C, H, W. The choice of w decides which
noise levels matter: composition is decided at high σ, texture at low σ.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.shown import Shown


@runtime_checkable
class Weighting(Protocol):
    """A weight for each step; anything with this method is one.

    >>> class High:
    ...     def weight(self, step: Transition) -> Tensor:
    ...         return (step.sigma > 0.5).float()
    >>> isinstance(High(), Weighting)
    True
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        ...


class Uniform(Shown):
    """w = 1: the flow-matching distance; on the SD3.5 grid the first five steps carry 56 % of it.

    >>> from flowopd.core import ODE
    >>> x, sigma = torch.zeros(2, 1, 1, 1), torch.tensor([0.9, 0.5])
    >>> Uniform().weight(ODE().step(x, x, sigma, sigma / 2))
    tensor([1., 1.])
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return torch.ones_like(step.sigma)


class ODEDistance(Shown):
    """w = dt²: the squared distance of the Euler steps.

    >>> from flowopd.core import ODE
    >>> x, sigma, sigma_next = torch.zeros(2, 1, 1, 1), torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.3])
    >>> ODEDistance().weight(ODE().step(x, x, sigma, sigma_next))
    tensor([0.0100, 0.0400])
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return (step.sigma_next - step.sigma) ** 2


class ExactKL(Shown):
    """w = gain² / 2·std²: the KL of the two steps, in nats per latent dimension.

    References:
        Flow-OPD (arXiv 2605.08063): Δt/2 · (σ_t(1 - t)/2t + 1/σ_t)² · ‖Δv‖².

    >>> from flowopd.core import DanceSDE
    >>> x, sigma, sigma_next = torch.zeros(1, 1, 1, 1), torch.tensor([0.9]), torch.tensor([0.8])
    >>> step = DanceSDE().step(x, x, sigma, sigma_next)
    >>> ExactKL().weight(step), step.kl(step.shifted_to(velocity=x + 1))
    (tensor([0.5611]), tensor([0.5611]))
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error.

        Raises:
            ValueError: on a deterministic step, whose KL is infinite. An accelerator is not asked, as that would wait
                for it; a training asks the whole grid on the CPU before its first step.
        """
        if step.std.device.type == "cpu" and not bool((step.std > 0).all()):
            raise ValueError(
                "the KL of a deterministic step is infinite; add noise to every trained step "
                "or weight steps by Uniform or ODEDistance"
            )
        return step.gain**2 / (2 * step.std**2)


class Released(ExactKL):
    """w = gain² / 2·g² with std² = g²·(-dt): the public Flow-OPD code, which leaves out the factor 1 / (-dt).

    >>> from flowopd.core import DanceSDE
    >>> x, sigma, sigma_next = torch.zeros(1, 1, 1, 1), torch.tensor([0.9]), torch.tensor([0.8])
    >>> step = DanceSDE().step(x, x, sigma, sigma_next)
    >>> Released().weight(step) / ExactKL().weight(step)
    tensor([0.1000])
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return super().weight(step) * (step.sigma - step.sigma_next)


class CleanPicture(Shown):
    """w = σ²: the squared distance of the clean pictures that two velocities predict,  x̂ = x - σ · v.

    >>> from flowopd.core import ODE
    >>> x, sigma = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 0.5])
    >>> CleanPicture().weight(ODE().step(x, x, sigma, sigma / 2))
    tensor([1.0000, 0.2500])
    """

    def weight(self, step: Transition) -> Tensor:
        """Return (B,) factors of the mean squared velocity error."""
        return step.sigma**2
