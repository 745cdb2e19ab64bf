"""Result tables: one row per model, one column per score."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowopd.evaluation.resampling import Interval

Cell = float | int | str | Interval
Table = Mapping[str, Mapping[str, Cell]]
"""Rows by model: scores, and what else is said of it."""


def columns(table: Table) -> list[str]:
    """Column names, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in table.values() for name in row))


def cells(table: Table) -> list[list[str]]:
    """Rows of text: the model, its scores to three decimals, and words as they are."""
    return [[model, *(_cell(row.get(name)) for name in columns(table))] for model, row in table.items()]


def markdown_table(table: Table) -> str:
    """The table in Markdown.

    >>> print(markdown_table({"base": {"text": 0.4}, "student": {"text": 0.75}}))
    | model | text |
    |---|---|
    | base | 0.400 |
    | student | 0.750 |
    """
    header = ["model", *columns(table)]
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, cells(table))])


def write_results(table: Table, folder: Path, name: str = "results") -> None:
    """Write ``results.csv`` and ``results.md``, or files of another name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown_table(table) + "\n", encoding="utf-8")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["model", *columns(table)], *cells(table)])


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _cell(value: Cell | None) -> str:
    if value is None or isinstance(value, int | str):
        return "" if value is None else str(value)
    return f"{value:.3f}"
