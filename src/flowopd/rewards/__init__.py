"""Rewards: anything that scores images. Names load on first use; what they need is imported then."""

from importlib import import_module
from typing import Any

from flowopd.rewards.base import DetailedReward, Reward, Scores, detailed

_HOMES: dict[str, str] = {
    "Aesthetic": "aesthetic",
    "CLIPScore": "clipscore",
    "HPSv2": "hps",
    "ImageReward": "image_reward",
    "PickScore": "pickscore",
    "OCR": "ocr",
    "RemoteReward": "remote.client",
    "DeQA": "deqa",
    "GenEval": "geneval",
    "Judge": "remote.judges",
    "Weighted": "weighted",
    "Judging": "judging",
    "Scorer": "scorer",
}  # public name: module of this folder

__all__ = ["DetailedReward", "Reward", "Scores", "detailed", *_HOMES]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'flowopd.rewards' has no attribute {name!r}")
    return getattr(import_module(f"flowopd.rewards.{_HOMES[name]}"), name)
