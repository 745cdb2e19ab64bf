"""Noise that belongs to its row: the same for every batch size, order and number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowopd.core.seeds import seed_of
from flowopd.core.shown import Shown
from flowopd.core.tensors import sent


class RowNoise(Shown):
    """Standard normal noise for B rows, drawn from one seed per row and step.

    A row's noise depends on its own key alone, so that splitting a rollout over micro-batches or ranks, or resuming a
    run, changes nothing.

    Args:
        shape: (C, H, W) of a latent.
        starts: B keys of the starting noise; siblings may share one.
        rows: B keys of the noise of the steps, all different.
        device: where the noise is wanted; it is drawn on the CPU, so that every device sees the same.

    >>> siblings = RowNoise((1, 1, 2), starts=["cat", "cat"], rows=["cat 0", "cat 1"])
    >>> siblings.start()[:, 0, 0]
    tensor([[0.2114, 0.0458],
            [0.2114, 0.0458]])
    >>> siblings.step(3)[:, 0, 0]
    tensor([[ 0.2833,  1.9533],
            [-0.1266,  0.1389]])
    >>> torch.equal(siblings[1:].step(3), siblings.step(3)[1:])
    True
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        starts: Sequence[object],
        rows: Sequence[object],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = shape
        self.starts = starts
        self.rows = rows
        self.device = device

    def __getitem__(self, rows: slice) -> RowNoise:
        """The noise of some of the rows."""
        return RowNoise(self.shape, self.starts[rows], self.rows[rows], self.device)

    def start(self) -> Tensor:
        """Starting noise (B, C, H, W)."""
        return self._draw("start", self.starts, self.shape)

    def shared_starts(self) -> tuple[list[int], list[int]]:
        """The first row of every starting noise, and for all B rows the index of their own among these."""
        order = {key: index for index, key in enumerate(dict.fromkeys(self.starts))}
        return [list(self.starts).index(key) for key in order], [order[key] for key in self.starts]

    def step(self, index: int) -> Tensor:
        """Noise (B, C, H, W) of step ``index``."""
        return self.named(f"step {index}", self.shape)

    def named(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Further noise (B, *shape), the same whenever it is asked for by the same name."""
        return self._draw(name, self.rows, shape)

    def _draw(self, name: str, keys: Sequence[object], shape: tuple[int, ...]) -> Tensor:
        drawn = {key: torch.randn(shape, generator=generator(f"{name} {key}")) for key in dict.fromkeys(keys)}
        return sent(torch.stack([drawn[key] for key in keys]), self.device)


def generator(key: object) -> torch.Generator:
    """A CPU generator seeded by the text of ``key``."""
    return torch.Generator().manual_seed(seed_of(key))
