"""Group-relative advantages."""

from typing import Literal

import torch
from torch import Tensor

from flowopd.core.ranges import above, at_least
from flowopd.core.shown import Shown


class GroupAdvantage(Shown):
    """Rewards against the siblings' mean,  A_i = clip((r_i - mean_group) / (std + ε)).

    A reward of NaN (scoring failed) gets advantage 0 and leaves its siblings' mean alone. Groups whose rewards are all
    equal get zeros; they are never dropped, so that every rank runs the same number of forwards.

    Args:
        scale: divide by the standard deviation of the ``group``, of the whole ``batch`` (Flow-GRPO), or by ``none``.
        clip: largest absolute advantage.
        eps: ε.

    References:
        Flow-GRPO (arXiv 2505.05470), whose released code scales by the batch.

    >>> rewards = torch.tensor([1.0, 0.0, 1.0, torch.nan])  # two groups of two siblings
    >>> GroupAdvantage("group")(rewards, group_size=2)
    tensor([ 0.9998, -0.9998,  0.0000,  0.0000])
    >>> GroupAdvantage("none")(rewards, group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """

    def __init__(
        self, scale: Literal["group", "batch", "none"] = "batch", clip: float = 5.0, eps: float = 1e-4
    ) -> None:
        above(0.0, clip=clip)
        at_least(0.0, eps=eps)
        self.scale = scale
        self.clip = clip
        self.eps = eps

    def __call__(self, rewards: Tensor, group_size: int) -> Tensor:
        """Return (B,) advantages of (B,) rewards whose siblings stand next to each other.

        Raises:
            ValueError: if the group size does not divide the batch.
        """
        if rewards.dim() != 1 or len(rewards) % group_size:
            raise ValueError(
                f"rewards of shape {tuple(rewards.shape)} do not fill groups of {group_size}; "
                "expected (B,) with B a multiple of the group size"
            )
        groups = rewards.double().reshape(-1, group_size)  # in float32 the mean of equal rewards may differ from them
        centred = groups - groups.nanmean(1, keepdim=True)
        advantage = (centred / self._divisor(centred, groups)).clamp(-self.clip, self.clip)
        return torch.nan_to_num(advantage, nan=0.0).flatten().float()

    def _divisor(self, centred: Tensor, groups: Tensor) -> Tensor:
        if self.scale == "none":
            return torch.ones(())
        if self.scale == "group":
            return (centred**2).nanmean(1, keepdim=True).sqrt() + self.eps
        return ((groups - groups.nanmean()) ** 2).nanmean().sqrt() + self.eps
