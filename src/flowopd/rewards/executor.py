"""Scoring a finished batch while the next one is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from flowopd.records import Prompt
from flowopd.rewards.base import Scores

Score = Callable[[Tensor, Sequence[Prompt]], Scores]


class Executor:
    """One thread that scores batches in the order in which they come.

    The scores are those that the caller would get by waiting, provided that a row's score does not depend on the other
    rows of its batch. For rewards that compute on the CPU or wait for a server; their pictures are brought to the CPU.

    Args:
        score: what to do with a batch; never called twice at the same time.
    """

    def __init__(self, score: Score) -> None:
        self._score = score
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[Scores]:
        """Begin to score images (B, 3, H, W); ``result()`` waits, and raises what the reward raised."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        return self._thread.submit(self._score, images.cpu(), list(prompts))

    def close(self) -> None:
        """Forget what has not begun; the next ``submit`` starts anew."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
