"""The language of the tiles world: what can be asked for, and pictures that answer.

composition    two red circle and three blue square
text           text red "KAHO"
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from flowopd.core.ranges import at_least, one_of
from flowopd.prompts import splits
from flowopd.prompts.splits import Split, other
from flowopd.records import Prompt
from flowopd.tiles.glyphs import COLOURS, GRID, LETTERS, SHAPES, code, draw

Task = Literal["composition", "text"]
Clause: TypeAlias = tuple[int, str, str]  # how many, colour, shape

TASKS: tuple[Task, ...] = get_args(Task)
NUMBERS = ("one", "two", "three", "four")


def parse(text: str) -> Prompt:
    """Read a prompt of either task; its metadata is what a picture must show.

    Returns:
        A prompt with ``clauses``, two of (how many, colour, shape), or with ``colour`` and ``word``.

    Raises:
        ValueError: a word the world does not know; the sentence names it.
    """
    return _parse_text(text) if text.startswith("text") else _parse_composition(text)


@lru_cache(maxsize=1 << 16)
def _parse_text(text: str) -> Prompt:
    found = re.fullmatch(r'text (\S+) "([^"]*)"', text)
    if not found:
        raise _unknown(text, text, ['text red "KAHO"'], "a text prompt")
    colour, word = found.groups()
    _check(text, colour, COLOURS, "a colour")
    for letter in word:
        _check(text, letter, tuple(LETTERS), "a letter")
    if len(word) not in (3, 4):
        raise ValueError(f"prompt {text!r}: {word!r} has {len(word)} letters; the tiles world writes 3 or 4")
    return Prompt(text, "text", {"colour": colour, "word": word})


@lru_cache(maxsize=1 << 16)
def _parse_composition(text: str) -> Prompt:
    clauses = tuple(_parse_clause(text, clause) for clause in text.split(" and "))
    if len({colour for _, colour, _ in clauses}) != 2 or len(clauses) != 2:
        raise ValueError(f"prompt {text!r}: expected two clauses of different colours, joined by 'and'")
    return Prompt(text, "composition", {"clauses": clauses})


def _parse_clause(text: str, clause: str) -> Clause:
    words = clause.split(" ")
    if len(words) != 3:
        raise _unknown(text, clause, ["two red circle"], "a clause")
    for word, known, what in zip(words, (NUMBERS, COLOURS, SHAPES), ("a number", "a colour", "a shape"), strict=True):
        _check(text, word, known, what)
    return NUMBERS.index(words[0]) + 1, words[1], words[2]


def _check(text: str, word: str, known: Sequence[str], what: str) -> None:
    if word not in known:
        raise _unknown(text, word, known, what)


def _unknown(text: str, word: str, known: Sequence[str], what: str) -> ValueError:
    return ValueError(f"prompt {text!r}: {word!r} is not {what} of the tiles world ({', '.join(known)})")


def split_of(prompt: Prompt) -> Split:
    """Which split a prompt belongs to, by a hash of what it asks for.

    Swapped clauses ask for the same picture and a word is the same word in every colour: such prompts stay together.
    """
    asked = prompt.metadata.get("word") or sorted(prompt.metadata["clauses"])
    return splits.split_of(str(asked))


class TilesPrompts:
    """Prompts of one task of the tiles world.

    >>> TilesPrompts("text").draw(1, seed=0)
    [Prompt(text='text yellow "ULIM"', task='text', metadata={'colour': 'yellow', 'word': 'ULIM'})]

    Args:
        task: what is asked for.
        split: ``train`` never draws the tenth of the prompts that is held out, ``test`` draws only those.
    """

    def __init__(self, task: Task, split: Split = "train") -> None:
        one_of(Task, task=task)
        one_of(Split, split=split)
        self.task = task
        self.split = split

    def divided(self) -> tuple["TilesPrompts", "TilesPrompts"]:
        """This split, and the other one."""
        return self, TilesPrompts(self.task, other(self.split))

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts; the same seed gives the same prompts."""
        at_least(0, count=count, seed=seed)
        dice = random.Random(seed)
        prompts: list[Prompt] = []
        while len(prompts) < count:
            prompt = parse(_composition(dice) if self.task == "composition" else _text(dice))
            if split_of(prompt) == self.split:
                prompts.append(prompt)
        return prompts


def _composition(dice: random.Random) -> str:
    return " and ".join(f"{dice.choice(NUMBERS)} {colour} {dice.choice(SHAPES)}" for colour in dice.sample(COLOURS, 2))


def _text(dice: random.Random) -> str:
    word = "".join(dice.choices(LETTERS, k=dice.choice((3, 4))))
    return f'text {dice.choice(COLOURS)} "{word}"'


def render(prompts: Sequence[Prompt], seed: int) -> Tensor:
    """Draw a random correct picture of each prompt.

    Composition puts its glyphs on random tiles; text stands in a random row, as far left or right as fits.

    Args:
        prompts: B prompts of either task.
        seed: of the places.

    Returns:
        (B, 3, 32, 32) images in [0, 1].
    """
    dice = random.Random(seed)
    return draw(torch.tensor([_place(parse(prompt.text), dice) for prompt in prompts]).view(-1, GRID * GRID))


def _place(prompt: Prompt, dice: random.Random) -> list[int]:
    codes = [0] * GRID * GRID
    glyphs = _codes(prompt)
    for place, glyph in zip(_places(prompt.task, len(glyphs), dice), glyphs, strict=True):
        codes[place] = glyph
    return codes


def _places(task: str, count: int, dice: random.Random) -> Sequence[int]:
    if task == "composition":
        return dice.sample(range(GRID * GRID), count)
    start = GRID * dice.randrange(GRID) + dice.randint(0, GRID - count)
    return range(start, start + count)


def _codes(prompt: Prompt) -> list[int]:
    asked = prompt.metadata
    if prompt.task == "text":
        return [code(asked["colour"], letter) for letter in asked["word"]]
    return [code(colour, shape) for count, colour, shape in asked["clauses"] for _ in range(count)]
