"""OCR: is the text that a prompt asks for written in the picture?"""

import logging
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowopd.core.ranges import at_least
from flowopd.prompts.ocr import letters, target_of
from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes

log = logging.getLogger(__name__)

SETTINGS = {
    "Global.use_cls": False,  # no turning of upside-down lines, as in the published reward
    "Global.log_level": "critical",
    "Det.limit_type": "max",  # never scaled up
    "Det.limit_side_len": 960,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
}


class OCR:
    """Closeness of the text in the picture to the text that was asked for,  r = 1 - min(d, n) / n,  in [0, 1].

    n is the length of the target and d its edit distance to everything read, in reading order, both without case and
    spaces (``prompts.ocr.letters``); d = 0 if the target stands somewhere in what was read. Parts: ``exact``, 1 if both
    are equal, and ``no_substring``, r without the bonus for standing somewhere, which a page full of text could earn.

    The target is ``target`` of the prompt's metadata, else the first span of the prompt in double quotes.

    Args:
        workers: processes that read, each with an engine of its own; 0 reads in this process. A script that uses some
            needs the usual ``if __name__ == "__main__":``.

    Raises:
        ImportError: if RapidOCR is missing.
        ValueError: on a negative number of workers.
    """

    def __init__(self, workers: int = 0) -> None:
        at_least(0, workers=workers)
        if missing := [name for name in ("rapidocr", "onnxruntime") if not find_spec(name)]:
            raise ImportError(f'the OCR reward needs {" and ".join(missing)}; pip install "flowopd[ocr]"')
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device; NaN where reading failed."""
        return self.detail(images, prompts).value

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score as ``score`` does, with the parts ``exact`` and ``no_substring``.

        Raises:
            ValueError: if a prompt asks for no text, or for something else.
        """
        images = as_bytes(images, prompts)
        targets = [letters(target_of(prompt)) for prompt in prompts]
        found = self.read(images)
        texts = [letters(text or "") for text in found]
        pairs = list(zip(texts, targets, strict=True))
        within, exact = ([target in text for text, target in pairs], [target == text for text, target in pairs])
        close = closeness(texts, targets)
        failed = torch.tensor([text is None for text in found], dtype=torch.bool)
        parts = {"exact": torch.tensor(exact).float(), "no_substring": close}
        value = close.masked_fill(torch.tensor(within, dtype=torch.bool), 1.0)
        value, *others = (part.masked_fill(failed, torch.nan).to(images.device) for part in (value, *parts.values()))
        return Scores(value, dict(zip(parts, others, strict=True)))

    def read(self, images: Tensor) -> list[str | None]:
        """Everything that is written in each image, in reading order without separators; None where reading failed.

        Args:
            images: (B, 3, H, W) uint8, RGB.
        """
        pixels = list(images.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy())  # BGR, as the engine wants
        if not self.workers:
            return [read_text(image) for image in pixels]
        try:
            return list(self._started().map(read_text, pixels))
        except BrokenProcessPool:
            log.warning("an OCR worker died and its batch has no scores; out of memory, perhaps: use fewer workers")
            self.close()
            return [None] * len(pixels)

    def close(self) -> None:
        """End the workers; the end of the program does so too, and the next use starts others."""
        if self._pool:
            self._pool.shutdown()
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        if not self._pool:  # spawned: a fork would copy a process that holds threads and a GPU
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_start_worker)
        return self._pool


def closeness(texts: Sequence[str], targets: Sequence[str]) -> Tensor:
    """1 - min(d, n) / n  for the edit distance d of each text to its target of n letters, (B,) in [0, 1]."""
    from torchmetrics.functional.text import edit_distance  # slow to import, and the workers do without

    if not texts:
        return torch.zeros(0)
    lengths = torch.tensor([float(len(target)) for target in targets])
    distances = edit_distance(texts, targets, reduction="none").float()
    return 1 - distances.minimum(lengths) / lengths


def read_text(image: np.ndarray[Any, Any]) -> str | None:
    """Everything that is written in an image (H, W, 3), uint8, BGR; None if the engine fails."""
    engine = _engine()
    try:
        return "".join(engine(image).txts or ())
    except Exception as error:  # whatever an engine of many parts may raise
        log.warning("OCR failed on an image: %s: %s", type(error).__name__, error)
        return None


@cache
def _engine() -> Any:  # noqa: ANN401
    """This process's engine; its models come with its package."""
    from rapidocr import RapidOCR

    return RapidOCR(params=SETTINGS)


def _start_worker() -> None:
    """Read on one core, leave Ctrl-C to the main process, and end when it ends, however it ends."""
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
