"""The typed records that flow from prompt to update: frozen, with shapes written.

``Prompt`` → ``Conditioning`` → ``Rollout`` → ``StepBatch``. A new fact is a new field or a new record; nothing here
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.objectives import Labels
from flowopd.core.tensors import picks, sent


@dataclass(frozen=True)
class Prompt:
    """One text to draw, and the task that teaches and judges it.

    Args:
        text: what the text encoders read.
        task: name of the task; it routes the prompt to its teacher and to its rewards.
        metadata: whatever a reward needs besides the text (targets, counts, ...).
    """

    text: str
    task: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one row each.

    Args:
        tokens: (B, L, D) text tokens for joint attention.
        pooled: (B, P) pooled text embedding, if the model reads one.
        mask: (B, L) bool on the CPU, which tokens are text; those behind it are padding. ``None``: all are read.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Conditioning:
        if isinstance(rows, Tensor | slice):
            return self._each(lambda part: part[rows])
        return self._each(lambda part: part[picks(rows, part.device)])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Move or cast, as ``Tensor.to``; a mask stays, for lengths must be known without waiting for a device."""
        return replace(self._each(lambda part: part.to(*args, **kwargs)), mask=self.mask)

    def sent(self, device: torch.device) -> Conditioning:
        """The same on a device, which is not waited for; a mask stays."""
        return replace(self._each(lambda part: sent(part, device)), mask=self.mask)

    def expand(self, rows: int) -> Conditioning:
        """Repeat a single row, (1, ...) → (rows, ...), without copying."""
        return self._each(lambda part: part.expand(rows, *part.shape[1:]))

    def copied(self) -> Conditioning:
        """The same in memory of its own."""
        return self._each(torch.clone)

    def parts(self) -> dict[str, Tensor]:
        """What there is, by name."""
        named = {"tokens": self.tokens, "pooled": self.pooled, "mask": self.mask}
        return {name: part for name, part in named.items() if part is not None}

    def lengths(self) -> list[int]:
        """Tokens of text of every row."""
        return [self.tokens.shape[1]] * len(self) if self.mask is None else self.mask.sum(1).tolist()

    def trimmed(self) -> Conditioning:
        """Without the columns that are padding in every row."""
        return self if self.mask is None else self._resized(max(self.lengths()))

    @staticmethod
    def ragged(rows: Sequence[Tensor]) -> Conditioning:
        """One row of each of B texts (L, D) of lengths of their own."""
        texts = [row[None] for row in rows]
        return Conditioning.cat([Conditioning(text, mask=torch.ones(text.shape[:2]).bool()) for text in texts])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack along the batch; rows with a mask are padded to the longest.

        Raises:
            ValueError: if texts of different lengths have no mask.
        """
        lengths = {part.tokens.shape[1] for part in parts}
        if len(lengths) > 1:
            if any(part.mask is None for part in parts):
                raise ValueError(f"texts of {sorted(lengths)} tokens have no mask; expected one, or equal lengths")
            parts = [part._resized(max(lengths)) for part in parts]
        names = parts[0].parts()
        return Conditioning(**{name: torch.cat([part.parts()[name] for part in parts]) for name in names})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(part) for name, part in self.parts().items()})

    def _resized(self, length: int) -> Conditioning:
        assert self.mask is not None
        more = length - self.tokens.shape[1]  # fewer, if negative: pad cuts
        return replace(self, tokens=F.pad(self.tokens, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)))


@dataclass(frozen=True)
class Rollout:
    """B trajectories of T steps drawn by one policy.

    Args:
        prompts: B prompts; siblings stand next to each other.
        cond: their encodings, B rows.
        sigmas: (T + 1,) noise levels, 1 → 0.
        latents: (B, T + 1, C, H, W) states, float32, noise first.
        velocities: (B, T, C, H, W) guided velocity at every visited state, where somebody wants to read them.
        log_probs: (B, T) nats per latent dimension; 0 where the step is deterministic.
        noisy: (T,) bool on the CPU, whether noise was injected at the step.
        labels: what the callbacks found out, each (B, T, ...).
        metrics: scalars to log with the first step of the rollout.
    """

    prompts: Sequence[Prompt]
    cond: Conditioning
    sigmas: Tensor
    latents: Tensor
    velocities: Tensor | None
    log_probs: Tensor
    noisy: Tensor
    labels: Labels = field(default_factory=Labels)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def label(self, **facts: Tensor) -> Rollout:
        """The same rollout, knowing more."""
        return replace(self, labels=replace(self.labels, **facts))

    def log(self, metrics: Mapping[str, float]) -> Rollout:
        """The same rollout, with scalars to log."""
        return replace(self, metrics={**self.metrics, **metrics})


@dataclass(frozen=True)
class StepBatch:
    """B visited states, the unit of one ``training_step``.

    Args:
        x: (B, C, H, W) states, float32.
        sigma, sigma_next: (B,) noise levels of the step, in [0, 1].
        noisy: (B,) bool, whether the step injects noise.
        cond: encodings, B rows.
        tasks: B task names.
        labels: what is known about the states, each (B, ...).
        metrics: scalars to log with this batch.
        counts: what the loss of this step counts among those of its rollout, 1 on average.
        step: its number in the rollout; None of states that are none of a rollout.
        level: σ of all rows, known without asking a device; None of states that have their own.
        advance: on the fused road, called with the student's detached transition; it moves the trajectory on.
    """

    x: Tensor
    sigma: Tensor
    sigma_next: Tensor
    noisy: Tensor
    cond: Conditioning
    tasks: Sequence[str]
    labels: Labels = field(default_factory=Labels)
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: float = 1.0
    step: int | None = None
    level: float | None = None
    advance: Callable[[Transition], None] | None = None

    def label(self, **facts: Tensor) -> StepBatch:
        """The same batch, knowing more."""
        return replace(self, labels=replace(self.labels, **facts))


@dataclass(frozen=True)
class EvaluationBatch:
    """B held-out prompts to draw.

    Args:
        prompts: B prompts.
        noise: (B, C, H, W) starting noise, the same for every model that is compared.
        counted: (B,) bool; False for rows that only pad the batch, so that all ranks run alike.
    """

    prompts: Sequence[Prompt]
    noise: Tensor
    counted: Tensor
