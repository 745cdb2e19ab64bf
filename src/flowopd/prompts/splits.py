"""What is trained on, and what is held out: apart by construction."""

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable
from zlib import crc32

from flowopd.core.seeds import seed_of
from flowopd.prompts.base import PromptSource
from flowopd.records import Prompt

Split = Literal["train", "test"]

HELD_OUT = 10  # one text in so many is kept for testing


@runtime_checkable
class Divisible(PromptSource, Protocol):
    """A source that can keep some of its texts for evaluation."""

    def divided(self) -> tuple[PromptSource, PromptSource]:
        """A source to train on, and one of what it never draws."""
        ...


def other(split: Split) -> Split:
    """The other split."""
    return "test" if split == "train" else "train"


def split_of(asked: str) -> Split:
    """Which split a text belongs to, by a hash of what it asks for: one in ten is held out."""
    return "train" if crc32(asked.encode()) % HELD_OUT else "test"


def divided(sources: Mapping[str, PromptSource]) -> tuple[dict[str, PromptSource], dict[str, PromptSource]]:
    """Sources of every task to train on, and sources of what is held out.

    A source that cannot divide itself stands on both sides; ``held_out`` then draws from it by a seed of its own.
    """
    trained, kept = dict(sources), dict(sources)
    for task, source in sources.items():
        if isinstance(source, Divisible):
            trained[task], kept[task] = source.divided()
    return trained, kept


def held_out(source: PromptSource, count: int) -> list[Prompt]:
    """Draw ``count`` prompts to evaluate with, always the same.

    No text is also trained on where the source is the other half of a ``Divisible`` one. A source without halves gets a
    seed that no training draw has; whether a text comes again is then a matter of how many it has.
    """
    return source.draw(count, 1 if isinstance(source, Divisible) else seed_of("held out"))
