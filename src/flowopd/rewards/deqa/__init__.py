"""DeQA: picture quality, by a vision-language model."""

from flowopd.rewards.deqa.reward import DeQA

__all__ = ["DeQA"]
