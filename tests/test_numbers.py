"""Every number that a public class takes has a range, and says so in one sentence."""

import inspect
import math
import re
from importlib import import_module

import pytest
from tiny import Brightness, Words, backbone

from flowopd.core import LinearSchedule, TransitionKL
from flowopd.teachers import BaseTeacher

HOMES = ("flowopd", "flowopd.core", "flowopd.rollouts", "flowopd.rewards", "flowopd.prompts", "flowopd.tiles")
HOMES += ("flowopd.evaluation", "flowopd.models", "flowopd.teachers", "flowopd.training", "flowopd.training.pretrain")

RECORDS = {"Column", "Conditioning", "Gaussian", "Labels", "Prompt", "Rollout", "RowNoise", "Scores", "StepBatch"}
RECORDS |= {
    "Draw",
    "Shots",
    "Question",
    "Transition",
    "Reward",
    "Teacher",
    "VelocityField",
    "Pairs",
    "HeldOut",
    "Dynamics",
}  # nobody writes them

NEEDED = {  # what a class cannot be made without
    "path": "nowhere",
    "pipeline": "nowhere",
    "out": "nowhere",
    "adapters": ["a", "b"],
    "prompts": {"red": Words("red")},
    "sources": {"red": Words("red")},
    "name": "red",
    "task": "composition",
    "tasks": ["red"],
    "reward": Brightness(),
    "rewards": {"red": Brightness()},
    "weights": {"red": 1.0},
    "url": "http://127.0.0.1:9",
    "base_url": "http://127.0.0.1:9",
    "model": "a judge",
    "rubric": "unified_reward",
    "objective": TransitionKL(),
    "objectives": [TransitionKL()],
    "groups": ["red"],
    "count": 1,
    "weighted": {"red": Brightness()},
    "terms": {"red": Brightness()},
    "start": 1.0,
    "end": 1.0,
    "iterations": 1,
    "a": 1.0,
    "b": 1.0,
    "schedule": LinearSchedule(),
    "teacher": BaseTeacher(),
    "reference": BaseTeacher(),
    "teachers": [BaseTeacher(), BaseTeacher()],
    "source": "nowhere",
    "benchmarks": {"red": None},
    "columns": {"red": "red/red"},
}
MEANT = {("Merge", "rank"): {"method": "svd"}, ("WeightedSum", "weights"): {"objectives": [TransitionKL()] * 2}}
KEYS = {"tags": "counting", "drift": "sharpness"}  # of a table of numbers
ANY_SIGN = {"weight", "weights", "drift"}
INFINITE = {"clip_range", "advantage_clip"}  # for none


def public() -> dict[str, type]:
    found = {}
    for home in HOMES:
        module = import_module(home)
        for name in getattr(module, "__all__", [n for n in vars(module) if n[0].isupper()]):
            thing = getattr(module, name)
            if (
                inspect.isclass(thing)
                and not inspect.isabstract(thing)
                and name not in RECORDS
                and thing.__module__.startswith("flowopd")
            ):
                found[name] = thing
    return found


def numbers() -> list[tuple[str, str, str]]:
    """Class, argument and annotation of every number."""
    return [
        (name, argument.name, text)
        for name, kind in sorted(public().items())
        for argument in inspect.signature(kind).parameters.values()
        if re.search(r"\b(int|float)\b", text := inspect.formatannotation(argument.annotation).strip("'"))
    ]


def beyond(argument: str, annotation: str) -> list[object]:
    """Values that no such argument takes."""
    whole = "float" not in annotation
    none = [math.nan, *([] if argument in INFINITE else [math.inf]), -math.inf, True, "two"]
    return none + ([] if argument in ANY_SIGN else [-1e9]) + ([1.5] if whole else [])


def shaped(annotation: str, value: object, key: str) -> object:
    """The value inside of what the annotation asks for."""
    if annotation.startswith("dict") or "Mapping" in annotation:
        return {key: (value, value) if "tuple" in annotation else value}
    if annotation.startswith("list"):
        return [(value, value), (1.0, 1.0)] if "tuple" in annotation else [value, 1.0]
    return (value, value) if annotation.startswith("tuple") else value


@pytest.mark.parametrize(("name", "argument", "annotation"), numbers(), ids=lambda text: text)
def test_a_number_out_of_range_is_refused_by_name(name, argument, annotation):
    kind = public()[name]
    needed = {
        other.name: NEEDED[other.name] if other.name != "backbone" else backbone("nowhere")
        for other in inspect.signature(kind).parameters.values()
        if other.default is other.empty and other.kind is not other.VAR_KEYWORD and other.name != argument
    }
    needed |= MEANT.get((name, argument), {})
    for value in beyond(argument, annotation):
        with pytest.raises(ValueError, match="expected") as refused:
            kind(**needed, **{argument: shaped(annotation, value, KEYS.get(argument, "red"))})
        sentence = str(refused.value)
        assert re.search(rf"{argument}|{KEYS.get(argument, 'red')}", sentence), sentence
        assert str(value) in sentence
        assert "\n" not in sentence
