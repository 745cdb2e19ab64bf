"""Prompts from a file, and into one."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flowopd.core.seeds import seed_of
from flowopd.prompts.base import PromptSource, shuffled_passes
from flowopd.prompts.splits import HELD_OUT
from flowopd.records import Prompt

KINDS = (".txt", ".jsonl")
LARGEST = 1 << 30  # bytes
NAMES = ("text", "prompt")  # of the text in a JSON object


class PromptList:
    """Prompts that are all known, drawn in shuffled passes.

    Without ``evaluation_prompts`` of its own, a run keeps a tenth of the texts for evaluation and trains on the others.

    Args:
        prompts: all of them, one at least.
        called: what they come from, for sentences.
    """

    def __init__(self, prompts: Sequence[Prompt], called: str = "the list") -> None:
        self.prompts = list(prompts)
        self._called = called

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts in shuffled passes over all; the same seed gives the same prompts."""
        return shuffled_passes(self.prompts, count, seed)

    def divided(self) -> tuple[PromptSource, PromptSource]:
        """Nine tenths of the texts to train on, and one tenth, one at least, that is held out; a hash says which.

        Raises:
            ValueError: if there is only one text.
        """
        texts = sorted({prompt.text for prompt in self.prompts}, key=seed_of)
        if len(texts) < 2:
            raise ValueError(f"{self._called} has one text, none to hold out; give evaluation_prompts too")
        kept = set(texts[: math.ceil(len(texts) / HELD_OUT)])
        train, test = ([p for p in self.prompts if (p.text in kept) == held] for held in (False, True))
        return PromptList(train, self._called), PromptList(test, self._called)


class PromptFile(PromptList):
    """One prompt per line: plain text, or JSON objects with ``text`` or ``prompt`` and any metadata besides.

    The whole file is read and checked at once. Without ``evaluation_prompts`` of its own, a run keeps a tenth of the
    texts for evaluation and trains on the others.

    Args:
        path: a ``.txt`` or ``.jsonl`` file in UTF-8; blank lines do not count.
        task: the task of its prompts.
        parse: import path of a function that turns a text into a ``Prompt`` and refuses texts that the rewards cannot
            judge, such as ``flowopd.tiles.parse``.
        trigger: words that a LoRA listens to, put before every text that does not hold them.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is another kind of file, holds no prompt, or one that cannot be read; with the line.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "mine.jsonl").write_text('{"prompt": "two cats", "count": 2}')
    ...     PromptFile(f"{folder}/mine.jsonl", "pets").draw(1, seed=0)
    [Prompt(text='two cats', task='pets', metadata={'count': 2})]
    """

    def __init__(self, path: str, task: str, parse: Callable[[str], Prompt] | None = None, trigger: str = "") -> None:
        self.path = path
        self.task = task
        fields = _json if _kind(path) == ".jsonl" else _plain
        lines = [(number, line) for number, line in enumerate(lines_of(_content(path), path), 1) if line]
        if not lines:
            raise ValueError(f"prompt file {path!r} holds no prompt; expected one per line")
        read = (read_prompt(partial(fields, line), f"line {n} of {path!r}", task, parse, trigger) for n, line in lines)
        super().__init__(list(read), f"prompt file {path!r}")


def read_prompt(
    fields: Callable[[], dict[str, Any]],
    where: str,
    task: str,
    parse: Callable[[str], Prompt] | None = None,
    trigger: str = "",
) -> Prompt:
    """A prompt of its fields: ``text`` or ``prompt``, and its metadata.

    Raises:
        ValueError: saying where it is, and why it is none.
    """
    try:
        found = _prompt(fields(), task, parse)
    except Exception as error:  # whatever a user's parse may raise
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is not a prompt of task {task!r}: {reason}") from error
    return found if trigger.casefold() in found.text.casefold() else replace(found, text=f"{trigger} {found.text}")


def _kind(path: str) -> str:
    """The kind of a prompt file, by the end of its name."""
    kind = Path(path).suffix.lower()
    if kind in KINDS:
        return kind
    how = "write one JSON object per line into a .jsonl file" if kind == ".json" else "write one prompt per line"
    raise ValueError(f"prompt file {path!r} is neither {' nor '.join(KINDS)}; {how}")


def _content(path: str) -> bytes:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"prompt file {path!r} does not exist")
    if not file.is_file():
        raise ValueError(f"prompt file {path!r} is {'a folder' if file.is_dir() else 'no file'}; name a file in it")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"prompt file {path!r} has {file.stat().st_size} bytes; expected {LARGEST} at most")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"prompt file {path!r} cannot be read: {error.strerror}") from error


def lines_of(data: bytes, name: str) -> list[str]:
    """Lines of UTF-8 text without the blanks around them; only a line break ends one, as users' prompts hold others.

    Args:
        data: the bytes of a file.
        name: of the file, for the sentence.

    Raises:
        ValueError: naming the line that is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad, before = error.object[error.start], error.object[: error.start]
        line = len((before + b".").splitlines())
        raise ValueError(f"line {line} of {name!r} is not UTF-8 (byte 0x{bad:02x}); save the file as UTF-8") from error
    return [line.strip() for line in io.StringIO(text, newline=None)]


def _plain(line: str) -> dict[str, Any]:
    if line.startswith("{") and line.endswith("}"):
        raise ValueError("it looks like JSON; a file of JSON objects has a name that ends in .jsonl")
    return {"text": line}


def _json(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line, object_pairs_hook=_once_each, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, one object per line ({error.msg} at column {error.colno})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object with 'text' or 'prompt', got {line:.80}")
    return fields


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON; say null")


def _prompt(fields: dict[str, Any], task: str, parse: Callable[[str], Prompt] | None) -> Prompt:
    """A prompt from its fields; what ``parse`` knows of its text comes first.

    Raises:
        ValueError: if there is no text, or two, or one that nobody can read.
    """
    named = [name for name in NAMES if name in fields]
    if len(named) != 1:
        raise ValueError(f"expected its text as 'text' or as 'prompt', got {'both' if named else sorted(fields)}")
    text = fields[named[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{named[0]} is {json.dumps(text):.80}; expected a text")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{named[0]} {text!a:.80} holds what no text has; is it UTF-8?")
    parsed = parse(text) if parse else Prompt(text, task)
    if not isinstance(parsed, Prompt):
        raise ValueError(f"parse gave {parsed!r:.80}; expected a Prompt")
    facts = parsed.metadata
    given = {name: value for name, value in fields.items() if name != named[0]}
    for name in facts.keys() & given.keys():
        if isinstance(facts[name], str) and not isinstance(given[name], str):
            raise ValueError(f"{name} is {json.dumps(given[name]):.80}; its text says {facts[name]!r}")
    return Prompt(text, task, {**facts, **given})


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
