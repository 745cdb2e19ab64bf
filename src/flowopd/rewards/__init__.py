"""Rewards: anything that scores images."""

from flowopd.rewards.base import Reward

__all__ = ["Reward"]
