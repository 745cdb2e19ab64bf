"""Where prompts come from."""

from typing import Protocol, runtime_checkable

from flowopd.records import Prompt


@runtime_checkable
class PromptSource(Protocol):
    """An endless, seeded stream of prompts of one task."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts; the same seed gives the same prompts."""
        ...
