"""Prompts from a file, and into one."""

import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flowopd.prompts.base import shuffled_passes
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
        return shuffled_passes(self.prompts, count, seed)

    def _lines(self) -> list[tuple[int, str]]:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"prompt file {self.path!r} does not exist")
        lines = lines_of(Path(self.path).read_bytes())
        return [(number, line) for number, line in enumerate(lines, 1) if line]

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


def lines_of(data: bytes) -> list[str]:
    """Lines of UTF-8 text without the blanks around them; only a line break ends one, as users' prompts hold others."""
    return [line.strip() for line in io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")]


def jsonl(prompts: Iterable[Prompt]) -> str:
    """Prompts as ``PromptFile`` reads them back: a JSON object per line, the metadata and then ``prompt``."""
    return "".join(json.dumps({**prompt.metadata, "prompt": prompt.text}) + "\n" for prompt in prompts)


def write(prompts: Iterable[Prompt], path: Path) -> None:
    """Write a JSONL file whole or not at all.

    Raises:
        ValueError: if the name does not end in ``.jsonl``.
        FileExistsError: if the file is there: nothing is written over.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"prompts are written as JSON lines; expected a name that ends in .jsonl, got {str(path)!r}")
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists; choose another name, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(jsonl(prompts), encoding="utf-8")
    os.replace(partial, path)
