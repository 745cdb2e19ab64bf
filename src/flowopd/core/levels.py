"""Noise levels at which finished pictures are noised again: a density over σ, as a map of standard normal numbers."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.ranges import at_least, within
from flowopd.core.shown import Shown


@runtime_checkable
class Levels(Protocol):
    """A density over noise levels; anything with this method is one.

    >>> class Always:
    ...     def levels(self, normal: Tensor) -> Tensor:
    ...         return torch.full_like(normal, 0.7)
    >>> isinstance(Always(), Levels)
    True
    """

    def levels(self, normal: Tensor) -> Tensor:
        """Return σ (B,), strictly between 0 and 1, of standard normal numbers (B,)."""
        ...


class LogitNormal(Shown):
    """logit σ ~ N(mean, std²).

    SD3 takes 0 and 1 and shifts the levels by 3, which amounts to a mean of log 3.

    Args:
        mean, std: of the logit of σ.

    References:
        Scaling Rectified Flow Transformers (Esser et al., 2024), Eq. 19.

    >>> LogitNormal(0.0, 1.0).levels(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.2689, 0.5000, 0.7311])
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        within(-10.0, 10.0, mean=mean)
        at_least(0.0, std=std)
        self.mean = mean
        self.std = std

    def levels(self, normal: Tensor) -> Tensor:
        """Return σ (B,) of standard normal numbers (B,)."""
        return torch.sigmoid(self.mean + self.std * normal)


class UniformLevels(Shown):
    """σ ~ U(low, high).

    Args:
        low, high: the smallest and the largest level.

    Raises:
        ValueError: if they do not ascend inside [0, 1].

    >>> UniformLevels(0.5, 1.0).levels(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.5793, 0.7500, 0.9207])
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        within(0.0, 1.0, low=low, high=high)
        if low >= high:
            raise ValueError(f"low is {low!r}, high {high!r}; expected low < high")
        self.low = low
        self.high = high

    def levels(self, normal: Tensor) -> Tensor:
        """Return σ (B,) of standard normal numbers (B,)."""
        quantile: Tensor = torch.special.ndtr(normal)
        return self.low + (self.high - self.low) * quantile
