"""One kind of bar for all that takes long, and lines that stand above it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
FORMAT = "{desc} |{bar:8}| {n_fmt}/{total_fmt} {remaining} left {rate_fmt}{postfix}"


def bar(total: int | None, what: str, shown: bool, unit: str = "batch", done: int = 0, leave: bool = False) -> Any:  # noqa: ANN401
    """A bar with its rate and the time that is left."""
    layout = FORMAT if total else None
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        leave=leave,
        disable=not shown,
        dynamic_ncols=True,
        bar_format=layout,
    )


def watched(things: Iterable[T], total: int, what: str, shown: bool) -> Iterator[T]:
    """The same things one by one, beside a bar that goes away."""
    with bar(total, what, shown) as seen:
        for thing in things:
            yield thing
            seen.update()


def say(line: str) -> None:
    """Print a line above whatever bar is there."""
    tqdm.write(line)


def say_scores(when: str, scores: Mapping[str, float], averaged: Sequence[str]) -> None:
    """Print the scores that count in the average, and it, in one line."""
    shown = [name for name in (*averaged, "average") if name in scores]
    if shown:
        say(f"{when}: {', '.join(f'{name} {scores[name]:.3f}' for name in shown)}")
