"""Prompts from a file."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowopd.records import Prompt


class PromptFile:
    """One prompt per line: plain text, or JSON objects with ``text`` or ``prompt`` and any metadata besides.

    Args:
        path: a ``.txt`` or ``.jsonl`` file.
        task: the task of its prompts.
        parse: import path of a function that turns a text into a ``Prompt`` and refuses texts that the rewards cannot
            judge, such as ``flowopd.tiles.parse``.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds no prompt, or one that cannot be read.
    """

    def __init__(self, path: str, task: str, parse: Callable[[str], Prompt] | None = None) -> None:
        self.path = path
        self.task = task
        self.prompts = [self._read(line, number, parse) for number, line in self._lines()]
        if not self.prompts:
            raise ValueError(f"prompt file {path!r} holds no prompt; expected one per line")

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts in shuffled passes over the file; the same seed gives the same prompts."""
        shuffler = random.Random(seed)
        drawn: list[Prompt] = []
        while len(drawn) < count:
            drawn += shuffler.sample(self.prompts, min(len(self.prompts), count - len(drawn)))
        return drawn

    def _lines(self) -> list[tuple[int, str]]:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"prompt file {self.path!r} does not exist")
        lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]

    def _read(self, line: str, number: int, parse: Callable[[str], Prompt] | None) -> Prompt:
        try:
            fields: dict[str, Any] = json.loads(line) if self.path.endswith(".jsonl") else {"text": line}
            text = fields.pop("text", None) or fields.pop("prompt")
            metadata = {**(parse(text).metadata if parse else {}), **fields}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"line {number} of {self.path!r} is not a prompt of task {self.task!r}: {error}"
            ) from error
        return Prompt(text, self.task, metadata)
