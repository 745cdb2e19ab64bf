"""Several rewards as one, with its breakdown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowopd.core.ranges import finite
from flowopd.records import Prompt
from flowopd.rewards.base import Reward, Scores, detailed


class Weighted:
    """Weighted sum of rewards,  r = Σ_k w_k · r_k.

    A row is NaN where a term of weight other than 0 is; a term of weight 0 is only watched. The parts are every term
    under its name, and the parts of a term as ``term/part``.

    Args:
        terms: the rewards, by name.
        weights: one weight for each of these names.

    Raises:
        ValueError: if the names differ, there are none, or a weight is not finite.
    """

    def __init__(self, terms: dict[str, Reward], weights: dict[str, float]) -> None:
        if not terms or set(terms) != set(weights):
            raise ValueError(
                f"expected a weight for every term, got terms {sorted(terms)} and weights {sorted(weights)}"
            )
        finite(**{f"weight of {name}": weight for name, weight in weights.items()})
        self.terms = terms
        self.weights = weights

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores (B,) with every term's scores and their parts."""
        terms = {name: detailed(term, images, prompts) for name, term in self.terms.items()}
        value = torch.zeros(len(images), device=images.device)
        parts: dict[str, Tensor] = {}
        for name, scores in terms.items():
            if self.weights[name]:  # 0 · NaN would be NaN
                value = value + self.weights[name] * scores.value
            parts |= {name: scores.value} | {f"{name}/{part}": column for part, column in scores.parts.items()}
        return Scores(value, parts)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device."""
        return self.detail(images, prompts).value
