"""Prompts that ask for a written text, and the rule that finds it: the first quoted span."""

import json
import random
import re
from pathlib import Path
from unicodedata import category, normalize

from flowopd.core.ranges import at_least, one_of
from flowopd.prompts import splits
from flowopd.prompts.splits import Split, other
from flowopd.records import Prompt

ALIKE = str.maketrans("‘’‚‛′“”„‟‐‒–—―−⁄", "'''''\"\"\"\"------/")  # noqa: RUF001 - to a reader
LENGTHS = range(2, 28)  # characters of a text
WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("ocr_words.json").read_text(encoding="utf-8"))


class OCRPrompts:
    """Seeded prompts of an object that carries a text of 2 to 27 characters; ``target`` in the metadata is that text.

    A draw repeats no prompt. A tenth of the texts, in any spelling of case and spaces, is held out for testing.

    >>> OCRPrompts().draw(1, seed=1)[0].text
    'A pixel art scene with a bakery bag that says "Feed the Cosmic Valley"'

    Args:
        split: ``train`` never draws a text that is held out, ``test`` draws only those.
        task: the task of the prompts.

    Raises:
        ValueError: on an unknown split.
    """

    def __init__(self, split: Split = "train", task: str = "ocr") -> None:
        one_of(Split, split=split)
        self.split = split
        self.task = task

    def divided(self) -> tuple["OCRPrompts", "OCRPrompts"]:
        """This split, and the other one."""
        return self, OCRPrompts(other(self.split), self.task)

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` different prompts; the same seed gives the same prompts."""
        at_least(0, count=count, seed=seed)
        dice = random.Random(seed)
        prompts: dict[str, Prompt] = {}
        while len(prompts) < count:
            target = _text(dice)
            if len(target) in LENGTHS and split_of(target) == self.split:
                text = _scene(target, dice)
                prompts[text] = Prompt(text, self.task, {"target": target})
        return list(prompts.values())


def split_of(target: str) -> Split:
    """Which split a text belongs to, by a hash of its letters."""
    return splits.split_of(letters(target))


def letters(text: str) -> str:
    r"""Text as it is compared: what a reader would call the same is the same.

    Without case and spaces, as published; beyond ASCII also however its letters are encoded (NFKC), without what cannot
    be seen, and with one kind of quotation marks and of dashes.

    >>> letters("CAFE\u0301 ½") == letters("café 1/2") != letters("cafe 1/2")
    True
    """
    text = normalize("NFKC", normalize("NFKC", text).casefold())
    return "".join(letter for letter in text if letter != " " and category(letter) != "Cf").translate(ALIKE)


def target_of(prompt: Prompt) -> str:
    """The text that a prompt wants written: ``target`` of its metadata, else its first quoted span.

    A span in straight double quotes comes before one in curly ones.

    Raises:
        ValueError: if there is none, nothing but spaces, or no text.
    """
    quoted = re.search(r'"([^"]*)"', prompt.text) or re.search("“([^”]*)”", prompt.text)
    target = prompt.metadata.get("target", quoted[1] if quoted else "")
    if not isinstance(target, str):
        raise ValueError(f"target of prompt {prompt.text!r} is {target!r}; expected a text, or no 'target' at all")
    if not letters(target):
        raise ValueError(
            f"prompt {prompt.text!r} asks for no text; write it in double quotes, or give a metadata 'target'"
        )
    return target


def parse(text: str) -> Prompt:
    """Read a prompt with a quoted text; for ``PromptFile(..., parse=flowopd.prompts.ocr.parse)``.

    Raises:
        ValueError: if it quotes nothing.
    """
    return Prompt(text, "ocr", {"target": target_of(Prompt(text, "ocr"))})


def _scene(target: str, dice: random.Random) -> str:
    words = {name: dice.choice(WORDS[f"{name}s"]) for name in ("carrier", "place", "style")}
    scene = dice.choice(WORDS["templates"]).format(text=target, **words)
    return scene[0].upper() + scene[1:]


def _text(dice: random.Random) -> str:
    adjective, noun, other = dice.choice(WORDS["adjectives"]), dice.choice(WORDS["nouns"]), dice.choice(WORDS["nouns"])
    verb, month, number = dice.choice(WORDS["verbs"]), dice.choice(WORDS["months"]), str(dice.randint(10, 2100))
    kinds = {  # and how often
        noun: 1,
        f"{adjective} {noun}": 3,
        f"{noun} & {other}": 2,
        f"{verb} the {noun}": 3,
        f"{verb} the {adjective} {noun}": 3,
        f"{adjective} {noun} {other}": 3,
        f"{noun} {number}": 2,
        f"{month} {dice.randint(1, 28)}": 1,
        f"{dice.randint(1, 12)}:{dice.randint(0, 59):02d} {dice.choice(('AM', 'PM'))}": 1,
        f"${dice.randint(1, 99)}.{dice.randint(0, 99):02d}": 1,
        number: 1,
    }
    text = dice.choices(list(kinds), weights=list(kinds.values()))[0]
    return text.upper() if dice.random() < 0.25 else text
