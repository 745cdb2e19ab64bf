"""GenEval's prompts: the official 553 by the rules of their generator, and others of the same kinds to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from flowopd.core.ranges import at_least, one_of, within
from flowopd.prompts.base import shuffled_passes
from flowopd.prompts.files import PromptFile, jsonl
from flowopd.prompts.splits import Split, other
from flowopd.records import Prompt

OBJECTS = (  # the classes of COCO in their order, some renamed
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
    *("surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse"),
    *("tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator"),
    *("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(MIRRORED)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAINED = {"position": 0.7, "counting": 0.5, "color_attr": 0.3, "colors": 0.1, "two_object": 0.1}
OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of evaluation_metadata.jsonl
PATIENCE = 1000  # refused draws in a row before a kind of prompt counts as exhausted


class GenEvalPrompts:
    """Prompts of GenEval, with the metadata its verdicts read: ``tag``, ``include`` and, for counting, ``exclude``.

    The test split is the official 553 prompts. The training split draws others by the same rules, and none that asks
    for a picture of the test split: "a dog left of a cat" is also "a cat right of a dog".

    >>> GenEvalPrompts(tags={"position": 1}, objects=["cat", "dog"]).draw(1, seed=0)[0].text
    'a photo of a dog right of a cat'

    Args:
        split: ``test`` or ``train``; what follows is of the training split.
        task: the task of the prompts.
        tags: shares of the kinds of prompts, any scale; default: position 7, counting 5, color_attr 3, colors 1,
            two_object 1. There is no single_object: the test split asks for all 80.
        objects: what may be asked for; default: all 80.
        max_count: the highest count, 2 to 10; up to 4, counting has 160 training prompts in all, so they repeat.
        exclude: a prompt file whose texts (and pictures, where it has GenEval's metadata) are not drawn either.

    Raises:
        ValueError: on an unknown split, tag or object, or a choice that the test split does not have.
    """

    def __init__(
        self,
        split: Split = "train",
        task: str = "geneval",
        tags: Mapping[str, float] | None = None,
        objects: Sequence[str] | None = None,
        max_count: int = 4,
        exclude: str | None = None,
    ) -> None:
        one_of(Split, split=split)
        if split == "test" and (tags, objects, max_count, exclude) != (None, None, 4, None):
            raise ValueError("GenEval's test split is fixed; tags, objects, max_count and exclude are for training")
        self.split = split
        self.task = task
        self.tags = _shares(tags or TRAINED)
        self.objects = _known(objects or OBJECTS)
        self.max_count = max_count
        within(2, len(NUMBERS) - 1, max_count=max_count)
        self.excluded = [*official(), *(PromptFile(exclude, task).prompts if exclude else [])]
        self._texts = {prompt.text for prompt in self.excluded}
        self._pictures = {_read_picture(prompt) for prompt in self.excluded if "include" in prompt.metadata}

    def divided(self) -> tuple[GenEvalPrompts, GenEvalPrompts]:
        """This split, and the other one."""
        return self, GenEvalPrompts(other(self.split), self.task)

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts; the same seed gives the same prompts.

        The test split comes in shuffled passes, the training split by the shares of its tags.

        Raises:
            ValueError: if nothing is left to draw of a tag.
        """
        at_least(0, count=count, seed=seed)
        if self.split == "test":
            return shuffled_passes(official(self.task), count, seed)
        dice = _Dice(np.random.default_rng(seed), self.objects, self.max_count, self.task)
        tags = dice.rng.choice(list(self.tags), size=count, p=list(self.tags.values()))
        return [self._fresh(dice, str(tag)) for tag in tags]

    def _fresh(self, dice: _Dice, tag: str) -> Prompt:
        for _ in range(PATIENCE):
            prompt = dice.throw(tag)
            if prompt.text not in self._texts and picture(prompt) not in self._pictures:
                return prompt
        raise ValueError(f"no prompt of {tag!r} is left outside the test split and the excluded file; widen objects")


def _shares(tags: Mapping[str, float]) -> dict[str, float]:
    if unknown := sorted(set(tags) - set(TRAINED)):
        raise ValueError(f"GenEval trains on {', '.join(TRAINED)}, got {unknown}")
    at_least(0.0, **{f"share of {tag}": share for tag, share in tags.items()})
    if not (total := sum(tags.values())):
        raise ValueError(f"one share at least must be above 0, got {dict(tags)}")
    return {tag: share / total for tag, share in tags.items()}


def _known(objects: Sequence[str]) -> tuple[str, ...]:
    if unknown := sorted(set(objects) - set(OBJECTS)):
        raise ValueError(f"GenEval's detector does not know {unknown}; it knows the {len(OBJECTS)} classes of COCO")
    if len(set(objects) - {"person"}) < 2:
        raise ValueError(f"GenEval asks for pairs; expected two objects besides 'person', got {list(objects)}")
    return tuple(dict.fromkeys(objects))


def picture(prompt: Prompt) -> tuple[Any, ...]:
    """What a prompt asks to see: the same for a pair and the pair swapped, for a relation and its mirror image."""
    clauses = prompt.metadata["include"]
    if "position" not in clauses[-1]:
        asked = sorted((clause["class"], clause["count"], clause.get("color", "")) for clause in clauses)
        return (prompt.metadata["tag"], *asked)
    there, here = (clause["class"] for clause in clauses)
    relation = clauses[-1]["position"][0]
    if relation in ("right of", "below"):
        here, relation, there = there, MIRRORED[relation], here
    return (prompt.metadata["tag"], here, relation, there)


def _read_picture(prompt: Prompt) -> tuple[Any, ...]:
    """``picture`` of a prompt from a user's file."""
    try:
        return picture(prompt)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"excluded prompt {prompt.text!r} has an 'include', but not as GenEval's files do") from error


@cache
def official(task: str = "geneval") -> tuple[Prompt, ...]:
    """The 553 prompts of the benchmark, in their order.

    Each kind is drawn 100 times (a single object once of each of the 80), and what came before is dropped.

    Raises:
        ValueError: if this numpy draws other numbers; numpy does not promise its streams for ever.
    """
    dice = _Dice(np.random.default_rng(OFFICIAL_SEED), task=task)
    drawn = [dice.single_object(OBJECTS[i]) for i in dice.rng.choice(len(OBJECTS), size=len(OBJECTS), replace=False)]
    drawn += [dice.throw(tag) for tag in TAGS[1:] for _ in range(100)]
    prompts = tuple({prompt.text: prompt for prompt in drawn}.values())
    if hashlib.sha256(jsonl(prompts).encode()).hexdigest() != OFFICIAL_SHA256:
        raise ValueError(
            f"numpy {np.__version__} draws other prompts than GenEval's official ones; install numpy 2.4, or read the "
            "official evaluation_metadata.jsonl with PromptFile"
        )
    return prompts


@dataclass(frozen=True)
class _Dice:
    """Draws prompts of each tag. What is drawn, and in which order, is the official generator's."""

    rng: np.random.Generator
    objects: Sequence[str] = OBJECTS
    max_count: int = 4
    task: str = "geneval"

    def throw(self, tag: str) -> Prompt:
        """Draw one prompt of any tag but ``single_object``."""
        prompt: Prompt = getattr(self, tag)()
        return prompt

    def single_object(self, thing: str) -> Prompt:
        return self._prompt("single_object", _a(thing), [_clause(thing)])

    def two_object(self) -> Prompt:
        a, b = self._pair(self.objects)
        return self._prompt("two_object", f"{_a(a)} and {_a(b)}", [_clause(a), _clause(b)])

    def counting(self) -> Prompt:
        thing = self._one(self.objects)
        count = int(self.rng.integers(2, self.max_count, endpoint=True))
        asked = f"{NUMBERS[count]} {_plural(thing)}"
        return self._prompt("counting", asked, [_clause(thing, count)], exclude=[_clause(thing, count + 1)])

    def colors(self) -> Prompt:
        thing, colour = self._one(self._things()), self._one(COLOURS)
        return self._prompt("colors", f"{_a(colour)} {thing}", [_clause(thing, color=colour)])

    def position(self) -> Prompt:
        a, b = self._pair(self.objects)
        relation = self._one(RELATIONS)
        clauses = [_clause(b), _clause(a, position=[relation, 0])]  # of the clause with number 0
        return self._prompt("position", f"{_a(a)} {relation} {_a(b)}", clauses)

    def color_attr(self) -> Prompt:
        (a, b), (one, other) = self._pair(self._things()), self._pair(COLOURS)
        clauses = [_clause(a, color=one), _clause(b, color=other)]
        return self._prompt("color_attr", f"{_a(one)} {a} and {_a(other)} {b}", clauses)

    def _prompt(self, tag: str, asked: str, include: list[dict[str, Any]], **more: Any) -> Prompt:
        return Prompt(f"a photo of {asked}", self.task, {"tag": tag, "include": include, **more})

    def _things(self) -> Sequence[str]:
        return [name for name in self.objects if name != "person"]  # no coloured people

    def _one(self, words: Sequence[str]) -> str:
        return words[int(self.rng.choice(len(words)))]

    def _pair(self, words: Sequence[str]) -> tuple[str, str]:
        first, second = self.rng.choice(len(words), size=2, replace=False)
        return words[int(first)], words[int(second)]


def _clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"  # "sheeps": the official prompts say so
