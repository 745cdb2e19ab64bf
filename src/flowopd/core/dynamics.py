"""How a velocity moves the state: one step x_σ → x_σ' as a Gaussian.

Every dynamics here is linear in the state and in the velocity,

    mean = state · x + gain · v,      std = std,

so a new one only says these three numbers for a pair of noise levels (``coefficients``) and inherits sampling,
log-probability, KL, weights over steps and training.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flowopd.core.gaussian import Gaussian
from flowopd.core.ranges import within
from flowopd.core.shown import Shown
from flowopd.core.tensors import expand_like, same_shape


class Coefficients(NamedTuple):
    """mean = state · x + gain · v and std, each (B,)."""

    state: Tensor
    gain: Tensor
    std: Tensor


@dataclass(frozen=True)
class Transition(Gaussian):
    """The Gaussian p(x_σ' | x_σ) of one step, and the velocity that proposed it.

    Args:
        velocity: (B, C, H, W).
        gain: (B,) derivative of the mean by the velocity; two velocities at one state differ by gain · Δv in mean.
        sigma, sigma_next: (B,).
        branches: what guidance made the velocity of, conditional and unconditional, where an objective asks for it.

    >>> x, sigma, sigma_next = torch.ones(1, 1, 1, 1), torch.tensor([0.8]), torch.tensor([0.6])
    >>> step = ODE().step(x, velocity=0 * x, sigma=sigma, sigma_next=sigma_next)
    >>> step.mean.flatten(), step.shifted_to(velocity=x).mean.flatten()
    (tensor([1.]), tensor([0.8000]))
    """

    velocity: Tensor = field(kw_only=True)
    gain: Tensor = field(kw_only=True)
    sigma: Tensor = field(kw_only=True)
    sigma_next: Tensor = field(kw_only=True)
    branches: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    def shifted_to(self, velocity: Tensor) -> "Transition":
        """The step that another velocity (B, C, H, W) proposes at the same state:  mean' = mean + gain · (v' - v)."""
        same_shape(velocity=self.velocity, other=velocity)
        mean = self.mean + expand_like(self.gain, velocity) * (velocity - self.velocity)
        return Transition(
            mean, self.std, velocity=velocity, gain=self.gain, sigma=self.sigma, sigma_next=self.sigma_next
        )

    def __getitem__(self, rows: Tensor | slice) -> "Transition":
        """Some rows of it, by their numbers."""
        return Transition(
            self.mean[rows],
            self.std[rows],
            velocity=self.velocity[rows],
            gain=self.gain[rows],
            sigma=self.sigma[rows],
            sigma_next=self.sigma_next[rows],
            branches=self.branches and (self.branches[0][rows], self.branches[1][rows]),
        )

    def detach(self) -> "Transition":
        """The same step without gradient."""
        return Transition(
            self.mean.detach(),
            self.std,
            velocity=self.velocity.detach(),
            gain=self.gain,
            sigma=self.sigma,
            sigma_next=self.sigma_next,
        )


class Dynamics(Shown, ABC):
    """A rule of stepping. Subclasses say where and how wide.

    Attributes:
        stochastic: whether its steps may inject noise.

    >>> class Half(Dynamics):
    ...     def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients:
    ...         return Coefficients(torch.ones_like(sigma), (sigma_next - sigma) / 2, 0.1 * sigma_next)
    >>> x, sigma, sigma_next = torch.zeros(1, 1, 1, 1), torch.tensor([1.0]), torch.tensor([0.6])
    >>> step = Half().step(x, velocity=x + 1, sigma=sigma, sigma_next=sigma_next)
    >>> step.mean.flatten(), step.std
    (tensor([-0.2000]), tensor([0.0600]))
    """

    stochastic = True

    @abstractmethod
    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients:
        """State factor, velocity gain and width of the step σ → σ', each (B,), for 1 ≥ σ > σ' ≥ 0."""

    def step(
        self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noisy: Tensor | None = None
    ) -> Transition:
        """Return the step from x.

        Args:
            x, velocity: (B, C, H, W), float32.
            sigma, sigma_next: (B,), 1 ≥ σ > σ' ≥ 0.
            noisy: (B,) bool; rows outside the noise window take the ODE's step. Default: all rows are noisy.
        """
        same_shape(x=x, velocity=velocity)
        same_shape(sigma=sigma, sigma_next=sigma_next, noisy=noisy)
        state, gain, std = self.coefficients(sigma, sigma_next)
        if noisy is not None:
            ode = ODE().coefficients(sigma, sigma_next)
            state, gain, std = (torch.where(noisy, a, b) for a, b in zip((state, gain, std), ode, strict=True))
        mean = expand_like(state, x) * x + expand_like(gain, x) * velocity
        return Transition(mean, std, velocity=velocity, gain=gain, sigma=sigma, sigma_next=sigma_next)


class ODE(Dynamics):
    """Euler step of the probability flow,  x' = x + (σ' - σ) · v,  std = 0.

    >>> ODE().coefficients(sigma=torch.tensor([0.8]), sigma_next=torch.tensor([0.6]))
    Coefficients(state=tensor([1.]), gain=tensor([-0.2000]), std=tensor([0.]))
    """

    stochastic = False

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients:
        """State factor, velocity gain and width, each (B,)."""
        return Coefficients(torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma))


class _ScoreSDE(Dynamics):
    """Euler-Maruyama step of the SDE with diffusion g(σ) and the ODE's marginals; dt = σ' - σ < 0.

    mean = x · (1 + g²·dt / 2σ) + v · (1 + g²(1 - σ) / 2σ) · dt
    std  = g · sqrt(-dt)
    """

    @abstractmethod
    def diffusion(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The diffusion g(σ), (B,)."""

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients:
        """State factor, velocity gain and width, each (B,)."""
        dt = sigma_next - sigma
        g = self.diffusion(sigma, sigma_next)
        state = 1 + g**2 * dt / (2 * sigma)
        gain = (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return Coefficients(state, gain, g * torch.sqrt(-dt))


class FlowSDE(_ScoreSDE):
    """Flow-SDE,  g(σ) = a · sqrt(σ / (1 - σ)).

    Args:
        noise_level: a ≥ 0; 0.7 in Flow-GRPO for SD3.5, 0 is the ODE.

    References:
        Flow-GRPO (arXiv 2505.05470).

    >>> FlowSDE(0.7).coefficients(sigma=torch.tensor([0.8]), sigma_next=torch.tensor([0.6]))
    Coefficients(state=tensor([0.7550]), gain=tensor([-0.2490]), std=tensor([0.6261]))
    """

    def __init__(self, noise_level: float = 0.7) -> None:
        within(0.0, 100.0, noise_level=noise_level)
        self.noise_level = noise_level

    def diffusion(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The diffusion g(σ), (B,)."""
        below_one = torch.where(sigma < 1, sigma, sigma_next)  # g diverges at σ = 1; the next grid point stands in
        return self.noise_level * torch.sqrt(sigma / (1 - below_one))


class DanceSDE(_ScoreSDE):
    """Dance-SDE, constant diffusion g = η.

    Args:
        noise_level: η ≥ 0; 0.3 in DanceGRPO.

    References:
        DanceGRPO (arXiv 2505.07818).

    >>> DanceSDE(0.3).coefficients(sigma=torch.tensor([0.8]), sigma_next=torch.tensor([0.6]))
    Coefficients(state=tensor([0.9887]), gain=tensor([-0.2022]), std=tensor([0.1342]))
    """

    def __init__(self, noise_level: float = 0.3) -> None:
        within(0.0, 100.0, noise_level=noise_level)
        self.noise_level = noise_level

    def diffusion(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The diffusion g(σ), (B,)."""
        return torch.full_like(sigma, self.noise_level)


class CPS(Dynamics):
    """Coefficient-preserving sampling: part of the predicted noise is redrawn, its total stays σ'.

        s = σ' · sin(a · π/2),   clean = x - σ·v,   noise = x + (1 - σ)·v
        mean = (1 - σ') · clean + sqrt(σ'² - s²) · noise,   std = s

    Args:
        noise_level: a in [0, 1]; the share of the noise that is redrawn, 0 is the ODE.

    References:
        Coefficients-Preserving Sampling for RL with flow matching (arXiv 2509.05952).

    >>> CPS(0.5).coefficients(sigma=torch.tensor([0.8]), sigma_next=torch.tensor([0.6]))
    Coefficients(state=tensor([0.8243]), gain=tensor([-0.2351]), std=tensor([0.4243]))
    """

    def __init__(self, noise_level: float = 0.7) -> None:
        within(0.0, 1.0, noise_level=noise_level)
        self.noise_level = noise_level

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients:
        """State factor, velocity gain and width, each (B,)."""
        std = sigma_next * math.sin(self.noise_level * math.pi / 2)
        kept = sigma_next * math.cos(self.noise_level * math.pi / 2)  # sqrt(σ'² - s²)
        return Coefficients(1 - sigma_next + kept, kept * (1 - sigma) - (1 - sigma_next) * sigma, std)
