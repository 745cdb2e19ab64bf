"""Grids of noise levels: T steps need T + 1 levels, from 1 down to 0."""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.ranges import at_least, within
from flowopd.core.shown import Shown


@runtime_checkable
class Schedule(Protocol):
    """A grid of noise levels; anything with this method is one.

    >>> class Quadratic:
    ...     def sigmas(self, num_steps: int) -> Tensor:
    ...         return torch.linspace(1, 0, num_steps + 1) ** 2
    >>> isinstance(Quadratic(), Schedule)
    True
    """

    def sigmas(self, num_steps: int) -> Tensor:
        """Return (num_steps + 1,) float32 levels, strictly decreasing from 1 to 0."""
        ...


class LinearSchedule(Shown):
    """Equal steps,  σ_j = 1 - j / T.

    >>> LinearSchedule().sigmas(4)
    tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """

    def sigmas(self, num_steps: int) -> Tensor:
        """Return (num_steps + 1,) float32 levels, strictly decreasing from 1 to 0."""
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float()


class ShiftedSchedule(Shown):
    """The grid of SD3: timesteps squeezed towards noise,  s(σ) = shift · σ / (1 + (shift - 1) · σ).

    Equal to diffusers' ``FlowMatchEulerDiscreteScheduler``, which shifts twice: its linear grid ends in the shifted
    smallest level s(1 / N) of its N training timesteps, and the whole grid is shifted again.

    Args:
        shift: how far the grid leans towards noise; 3 for SD3 and SD3.5, 1 for none.
        num_train_timesteps: N.

    References:
        Scaling Rectified Flow Transformers (Esser et al., 2024), Eq. 23.

    >>> ShiftedSchedule(shift=3.0).sigmas(10)[-3:]
    tensor([0.2780, 0.0089, 0.0000])
    """

    def __init__(self, shift: float = 3.0, num_train_timesteps: int = 1000) -> None:
        within(0.01, 100.0, shift=shift)
        at_least(2, num_train_timesteps=num_train_timesteps)
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    def sigmas(self, num_steps: int) -> Tensor:
        """Return (num_steps + 1,) float32 levels, strictly decreasing from 1 to 0."""
        smallest = self._shifted(torch.tensor(1 / self.num_train_timesteps, dtype=torch.float64))
        levels = self._shifted(torch.linspace(1, smallest.item(), num_steps, dtype=torch.float64))
        return torch.cat([levels, levels.new_zeros(1)]).float()

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


class FlowSchedule(Shown):
    """The grid of FLUX, Qwen-Image and Z-Image: equal steps, shifted once, and stretched if there is a terminal level.

        σ = linspace(1, 1 / T, T),    s(σ) = shift · σ / (1 + (shift - 1) · σ),
        1 - (1 - s) · (1 - terminal) / (1 - s(1 / T))

    Equal to diffusers' ``FlowMatchEulerDiscreteScheduler`` where its pipeline asks for equal steps. A shift by the
    picture's size is e^μ.

    Args:
        shift: how far the grid leans towards noise; 1 for none.
        terminal: the last level before 0; default: as the shift leaves it.

    References:
        Scaling Rectified Flow Transformers (Esser et al., 2024), Eq. 23.

    >>> FlowSchedule(shift=6.0).sigmas(4)
    tensor([1.0000, 0.9474, 0.8571, 0.6667, 0.0000])
    >>> FlowSchedule(shift=6.0, terminal=0.02).sigmas(4)
    tensor([1.0000, 0.8453, 0.5800, 0.0200, 0.0000])
    """

    def __init__(self, shift: float = 1.0, terminal: float | None = None) -> None:
        within(0.01, 100.0, shift=shift)
        within(0.0, 0.99, terminal=terminal)
        self.shift = shift
        self.terminal = terminal

    def sigmas(self, num_steps: int) -> Tensor:
        """Return (num_steps + 1,) float32 levels, strictly decreasing from 1 to 0."""
        levels = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
        levels = self.shift * levels / (1 + (self.shift - 1) * levels)
        if self.terminal and num_steps > 1:
            levels = 1 - (1 - levels) * (1 - self.terminal) / (1 - levels[-1])
        return torch.cat([levels, levels.new_zeros(1)]).float()


class EmpiricalSchedule(Shown):
    """The grid of FLUX.2: that of ``FlowSchedule`` at a shift e^μ which depends on the picture's size and on T.

        μ = m₁₀ + (m₂₀₀ - m₁₀) · (T - 10) / 190,
        m₁₀ = 8.738e-5 · tokens + 1.898,    m₂₀₀ = 1.693e-4 · tokens + 0.457,

    and m₂₀₀ itself above 4300 tokens. A rollout of few steps and an evaluation of many do not lie on one curve.

    Args:
        tokens: image tokens of a picture, a token for 16 x 16 pixels.

    References:
        The public code of FLUX.2 (Black Forest Labs, 2025), ``compute_empirical_mu``.

    >>> EmpiricalSchedule(tokens=1024).sigmas(4)
    tensor([1.0000, 0.9581, 0.8840, 0.7175, 0.0000])
    """

    def __init__(self, tokens: int) -> None:
        at_least(1, tokens=tokens)
        self.tokens = tokens

    def sigmas(self, num_steps: int) -> Tensor:
        """Return (num_steps + 1,) float32 levels, strictly decreasing from 1 to 0."""
        few, many = 8.73809524e-05 * self.tokens + 1.89833333, 0.00016927 * self.tokens + 0.45666666
        mu = many if self.tokens > 4300 else few + (many - few) * (num_steps - 10) / 190
        return FlowSchedule(math.exp(mu)).sigmas(num_steps)
