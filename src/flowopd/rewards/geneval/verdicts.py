"""GenEval's verdicts: what a prompt asks for, against what a detector found. Pure functions, no network.

``correct`` is the published metric; ``strict`` and ``partial`` are what flow_grpo trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from flowopd.prompts.geneval import COLOURS, OBJECTS, RELATIONS, TAGS
from flowopd.records import Prompt

Verdict = Literal["correct", "strict", "partial"]
Compat = Literal["fixed", "flow_grpo"]
Box = tuple[float, float, float, float]

LEAST_SCORE = 0.3  # a detection counts above it,
LEAST_SCORE_COUNTING = 0.9  # or above this one where the prompt is about a number
MOST_OBJECTS = 16  # of one class
OVERLAP = 0.1  # share of both sizes that an offset must exceed to be one


@dataclass(frozen=True)
class Detection:
    """One object in one image.

    Args:
        label: its class, one of ``OBJECTS``.
        score: confidence in [0, 1].
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
        mask: (H, W) bool, where it is; not needed by the verdicts.
    """

    label: str
    score: float
    box: Box
    mask: Tensor | None = field(default=None, compare=False, repr=False)


Found = Mapping[str, Sequence[Detection]]  # by class, the surest first
Color = Callable[[Detection], str]


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class; of a colour; in a relation to every object of an earlier clause."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: every ``include`` clause, and fewer objects than any ``exclude`` clause counts."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def of(cls, prompt: Prompt) -> Scene:
        """Read ``prompt.metadata``, a line of GenEval's own JSONL: ``{"tag", "include", "exclude"}``.

        Raises:
            ValueError: if it is missing, incomplete, or names an unknown tag, object, colour or relation.
        """
        metadata = prompt.metadata
        if "tag" not in metadata or not metadata.get("include"):
            raise ValueError(
                f"prompt {prompt.text!r} has no GenEval metadata, only {sorted(metadata)}; expected 'tag' and "
                "'include' as in GenEval's JSONL files"
            )
        try:
            if metadata["tag"] not in TAGS:
                raise ValueError(f"unknown tag {metadata['tag']!r}; expected one of {', '.join(TAGS)}")
            include = tuple(_clause(entry, k) for k, entry in enumerate(metadata["include"]))
            return cls(metadata["tag"], include, tuple(_clause(entry, 0) for entry in metadata.get("exclude") or ()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"prompt {prompt.text!r}: {error}") from error


def _clause(entry: Mapping[str, Any], index: int) -> Clause:
    """Clause number ``index``; a position may refer to those before it."""
    if not isinstance(entry, Mapping) or not {"class", "count"} <= set(entry):
        raise ValueError(f"a GenEval clause needs 'class' and 'count', got {entry!r}")
    clause = Clause(entry["class"], entry["count"], entry.get("color"), _position(entry, index))
    if clause.label not in OBJECTS:
        raise ValueError(f"unknown object {clause.label!r}; GenEval knows COCO's 80, such as 'bench' or 'tv remote'")
    if clause.color is not None and clause.color not in COLOURS:
        raise ValueError(f"unknown colour {clause.color!r}; expected one of {', '.join(COLOURS)}")
    if not isinstance(clause.count, int) or clause.count < 1:
        raise ValueError(f"expected a count of at least 1 {clause.label}, got {clause.count!r}")
    return clause


def _position(entry: Mapping[str, Any], index: int) -> tuple[str, int] | None:
    if entry.get("position") is None:
        return None
    try:
        relation, target = entry["position"]
    except (TypeError, ValueError):
        raise ValueError(f"expected a position as [relation, clause], got {entry['position']!r}") from None
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}; expected one of {', '.join(RELATIONS)}")
    if not isinstance(target, int) or not 0 <= target < index:
        raise ValueError(f"clause {index} is placed relative to clause {target!r}; expected an earlier one")
    return relation, target


def select(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Detections that count, by class, the surest first.

    Their score is > 0.3, or > 0.9 for the tag ``counting``; of each class the first 16.
    """
    least = LEAST_SCORE_COUNTING if tag == "counting" else LEAST_SCORE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > least and len(group := found.setdefault(detection.label, [])) < MOST_OBJECTS:
            group.append(detection)
    return found


def relations(a: Box, b: Box) -> set[str]:
    """Where box ``a`` is, seen from box ``b``: none, one or two of ``RELATIONS``.

    d = centre(a) - centre(b), shrunk per axis to  r = sign(d) · max(|d| - 0.1 · (size(a) + size(b)), 0),
    and  u = r / ‖d‖.  Left of: u_x < -0.5; right of: u_x > 0.5; above: u_y < -0.5; below: u_y > 0.5.
    None where both |r| < 0.001. Image coordinates: y grows downwards.
    """
    d = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [OVERLAP * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    r = [(1 if d[i] > 0 else -1) * max(abs(d[i]) - slack[i], 0.0) for i in (0, 1)]
    if max(map(abs, r)) < 1e-3:
        return set()
    norm = (d[0] ** 2 + d[1] ** 2) ** 0.5
    x, y = r[0] / norm, r[1] / norm
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name in RELATIONS if holds[name]}


def correct(found: Found, scene: Scene, color: Color) -> bool:
    """GenEval's own verdict, on the surest ``count`` objects of each clause; extra ones only hurt ``exclude``."""
    groups: list[Sequence[Detection] | None] = []
    for clause in scene.include:
        surest = found.get(clause.label, ())[: clause.count]
        groups.append(surest if _holds(clause, surest, groups, color) else None)
    crowded = any(len(found.get(clause.label, ())) >= clause.count for clause in scene.exclude)
    return None not in groups and not crowded


def strict(found: Found, scene: Scene, color: Color) -> bool:
    """All objects of each clause are there, and not one more; ``exclude`` is not read."""
    return None not in _strict_groups(found, scene, color)


def partial(found: Found, scene: Scene, color: Color, compat: Compat = "fixed") -> float:
    """Mean of the terms of all clauses.

    A clause of count n adds

        1 - |n - found| / n;
        if found ≠ n: 0 where a colour or a position is asked for;
        else with a colour  1 - |n - k| / n,  k of the right colour;
             with a position, if the colours are right: 1 if all pairs are in relation, else 0.

    ``fixed`` keeps every term in [0, 1]. ``flow_grpo`` lets counts go below 0 without bound, and adds a 1 after the 0
    of a wrong position (so that two objects in the wrong place earn 0.75, not 0.667).
    """
    groups = _strict_groups(found, scene, color)
    terms: list[float] = []
    for k, clause in enumerate(scene.include):
        terms += _terms(clause, found.get(clause.label, ()), groups[:k], color, compat)
    return sum(terms) / len(terms)


def to_color(found: Found, scene: Scene) -> list[Detection]:
    """The detections whose colour a verdict may ask for."""
    asked = [clause for clause in scene.include if clause.color is not None]
    return [
        detection
        for clause in asked
        if len(group := found.get(clause.label, ())) >= clause.count
        for detection in group[: clause.count]
    ]


Groups = Sequence[Sequence[Detection] | None]  # per clause so far: its objects, None where it does not hold


def _strict_groups(found: Found, scene: Scene, color: Color) -> Groups:
    groups: list[Sequence[Detection] | None] = []
    for clause in scene.include:
        group = found.get(clause.label, ())
        groups.append(group if _holds(clause, group, groups, color) else None)
    return groups


def _holds(clause: Clause, group: Sequence[Detection], before: Groups, color: Color) -> bool:
    return (
        len(group) == clause.count and _colored(clause, group, color) == clause.count and _placed(clause, group, before)
    )


def _colored(clause: Clause, group: Sequence[Detection], color: Color) -> int:
    """Objects of the right colour; all, if none is asked for."""
    return sum(clause.color is None or color(detection) == clause.color for detection in group)


def _placed(clause: Clause, group: Sequence[Detection], before: Groups) -> bool:
    """Every object is in relation to every target; not if the target's clause failed."""
    if clause.position is None:
        return True
    relation, target = clause.position
    targets = before[target]
    return targets is not None and all(relation in relations(a.box, b.box) for a in group for b in targets)


def _terms(clause: Clause, group: Sequence[Detection], before: Groups, color: Color, compat: Compat) -> list[float]:
    terms = [_closeness(clause.count, len(group), compat)]
    if len(group) != clause.count:
        return terms + [0.0] * (clause.color is not None or clause.position is not None)
    right = _colored(clause, group, color)
    if clause.color is not None:
        terms.append(_closeness(clause.count, right, compat))
    if clause.position is not None and right == clause.count:
        terms += _position_terms(clause, group, before, compat)
    return terms


def _closeness(count: int, found: int, compat: Compat) -> float:
    closeness = 1 - abs(count - found) / count
    return closeness if compat == "flow_grpo" else max(closeness, 0.0)


def _position_terms(clause: Clause, group: Sequence[Detection], before: Groups, compat: Compat) -> list[float]:
    if _placed(clause, group, before):
        return [1.0]
    target_is_there = clause.position is not None and before[clause.position[1]] is not None
    return [0.0, 1.0] if compat == "flow_grpo" and target_is_there else [0.0]
