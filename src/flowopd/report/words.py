"""What got better and what got worse, in words."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flowopd.report.runs import Run

SAME = 0.0005
"""Tables have three decimals; less than half of the last is no change."""


class Change(NamedTuple):
    """A score, before and after."""

    score: str
    before: float
    after: float

    @property
    def by(self) -> float:
        """How much it rose."""
        return self.after - self.before


def number(value: float | None) -> str:
    """Three decimals, with the typographer's minus.

    >>> number(0.25), number(None)
    ('0.250', '–')
    """
    return "–" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A difference.

    >>> signed(0.0625)
    '+0.062'
    """
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def changes(run: Run) -> list[Change]:
    """Every score that is known before and after."""
    known = [(score, run.before(score), run.after(score)) for score in run.scores]
    return [Change(score, before, after) for score, before, after in known if before is not None and after is not None]


def origin(run: Run) -> str:
    """What the trained model is compared with: its start, or the base where nothing was trained."""
    if not run.fit:
        return "base"
    return "cold start" if "cold-start" in run.table and run.ours != "cold-start" else "start"


def headline(run: Run) -> str:
    """One sentence about one run."""
    found = changes(run)
    if not found:
        return "There are no scores of this run yet."
    average = next((change for change in found if change.score == "average"), None)
    parts = [change for change in found if change is not average]
    better = [change.score for change in parts if change.by > SAME]
    worse = [change.score for change in parts if change.by < -SAME]
    way = f"than the {origin(run)}"
    said = [f"better {way} at {_listed(better)}"] * bool(better) + [f"worse at {_listed(worse)}"] * bool(worse)
    whole = ", ".join(said).replace("worse at", "worse at" if better else f"worse {way} at") or f"no other {way}"
    return f"{_moved(average)}{whole[0].upper()}{whole[1:]}."


def _moved(average: Change | None) -> str:
    if average is None:
        return ""
    if abs(average.by) <= SAME:
        return f"The average stays at {number(average.after)}. "
    way = "up" if average.by > 0 else "down"
    return f"The average is {number(average.after)}, {way} from {number(average.before)}. "


def comparison(runs: Sequence[Run]) -> str:
    """One sentence about several runs."""
    averages = {run.name: run.after("average") for run in runs}
    known = {name: value for name, value in averages.items() if value is not None}
    if len(known) < 2:
        return f"{len(runs)} runs side by side."
    order = sorted(known, key=lambda name: -known[name])
    lead = known[order[0]] - known[order[1]]
    if lead <= SAME:
        return f"{order[0]} and {order[1]} have the highest average, {number(known[order[0]])}."
    return f"{order[0]} has the highest average, {number(known[order[0]])}, {signed(lead)} over {order[1]}."


def evaluated_otherwise(runs: Sequence[Run]) -> str:
    """What differs between the evaluations of runs; empty if they compare."""
    found = [run.evaluation() for run in runs]
    names = sorted({name for one in found for name in one})
    differ = [name for name in names if len({one.get(name, "") for one in found}) > 1]
    if not differ:
        return ""
    return (
        f"These runs were not evaluated alike: {_listed(differ)} differ{'s' if len(differ) == 1 else ''}. "
        "Their scores do not compare directly."
    )


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(42), duration(3720), duration(None)
    ('42 s', '1 h 2 min', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


PATH = re.compile(r"""(?<![\w./:<])/(?:[^\s/'",;:<>()\[\]{}|]+/)+[^\s'",;:<>()\[\]{}|]*""")
"""A path from the root, of two parts or more."""

DEEP = 3
"""Parts that a path has in common with a folder, at least, to be told from there."""


def near(text: str, folder: Path) -> str:
    """A text without paths from the root: they are told from a folder on, those far from it by their last two parts.

    >>> near("--config /home/me/mine/opd.yaml of /data/models/base", Path("/home/me/mine/runs/opd"))
    '--config ../../opd.yaml of …/models/base'
    """

    def told(found: re.Match[str]) -> str:
        path, home = os.path.normpath(found[0]), os.path.abspath(folder)
        close = len(Path(os.path.commonpath([path, home])).parts) >= DEEP
        return os.path.relpath(path, home) if close else "/".join(["…", *Path(path).parts[-2:]])

    return PATH.sub(told, text)


def _listed(names: Sequence[str]) -> str:
    *most, last = names or [""]
    return f"{', '.join(most)} and {last}" if most else last
