"""The table over all runs of a study: mean ± sample standard deviation over the seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

WIDTH = 80
"""Columns of a terminal that the printed table fits into."""

ALWAYS = ("model", "seeds", "hours")


@dataclass(frozen=True)
class Row:
    """A model's scores.

    Args:
        name: of the model.
        wanted: seeds that there should be.
        hours: that all its runs took together; None where it took none of its own.
        scores: of every seed, by column.
    """

    name: str
    wanted: int
    hours: float | None
    scores: Sequence[dict[str, float]]

    def values(self, column: str) -> list[float]:
        """Scores of all seeds that have this one."""
        return [scores[column] for scores in self.scores if column in scores]

    def seeds(self) -> str:
        """How many seeds the row speaks of."""
        return str(self.wanted) if len(self.scores) == self.wanted else f"{len(self.scores)} of {self.wanted}"

    def took(self) -> str:
        """Hours, as they are shown."""
        return "" if self.hours is None else f"{self.hours:.2f}"


def read_results(run: Path) -> dict[str, dict[str, float]]:
    """Scores of every model of a run, by ``results.csv``; none where there is no such file."""
    path = run / "results.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row.pop("model"): {name: score for name, text in row.items() if (score := _number(text)) is not None}
            for row in csv.DictReader(file)
        }


def trained(table: Mapping[str, object]) -> str:
    """The model of a table that was trained: the last; empty if there is none."""
    return next(reversed(list(table)), "")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation; NaN where there are too few.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0])
    ((2.0, 1.0), (1.0, nan))
    """
    return (fmean(values) if values else math.nan), (stdev(values) if len(values) > 1 else math.nan)


def shown(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, to three decimals.

    >>> shown([0.8, 0.9]), shown([0.8]), shown([])
    ('0.850 ± 0.071', '0.800', '')
    """
    mean, apart = spread(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.3f}" if math.isnan(apart) else f"{mean:.3f} ± {apart:.3f}"


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of scores, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for scores in row.scores for name in scores))


def cells(rows: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    """The table as text, with its header."""
    return [
        [*ALWAYS, *names],
        *([row.name, row.seeds(), row.took(), *(shown(row.values(n)) for n in names)] for row in rows),
    ]


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write ``<path>.md`` and ``<path>.csv``, the latter with a column of its own for every spread."""
    names = columns(rows)
    header, *body = cells(rows, names)
    lines = [f"| {' | '.join(line)} |" for line in [header, *body]]
    lines.insert(1, "|---" * len(header) + "|")
    legend = "Mean ± sample standard deviation over the seeds; hours of all seeds together."
    path.with_suffix(".md").write_text("\n".join([*lines, "", legend, ""]), encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*ALWAYS, *(part for name in names for part in (name, f"{name} ±"))])
        for row in rows:
            numbers = [number for name in names for number in spread(row.values(name))]
            writer.writerow(
                [row.name, row.seeds(), row.took(), *("" if math.isnan(n) else f"{n:.6g}" for n in numbers)]
            )


def printed(rows: Sequence[Row], width: int = WIDTH) -> str:
    """The table as text of at most ``width`` columns: what does not fit beside one another stands below."""
    return "\n\n".join("\n".join(_aligned(cells(rows, names))) for names in _blocks(rows, width))


def _blocks(rows: Sequence[Row], width: int) -> Iterator[list[str]]:
    block: list[str] = []
    for name in columns(rows):
        if block and max(map(len, _aligned(cells(rows, [*block, name])))) > width:
            yield block
            block = []
        block.append(name)
    yield block


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
