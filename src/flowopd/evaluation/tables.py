"""Result tables: one row per model, one column per score."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

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


def show(table: Table, marked: str = "", console: Console | None = None) -> None:
    """Print a table on its side: a line per column and a row per model, which fits eighty letters.

    Models that find no room beside one another stand below.

    Args:
        table: rows by model.
        marked: the model that it is about; its numbers are bold.
        console: where to; default: what is printed.
    """
    console = console or Console()
    for block in _blocks(table, console.width):
        console.print("", _sideways(block, columns(table), marked))


def _sideways(table: Table, names: Sequence[str], marked: str) -> RichTable:
    found = RichTable(box=None, pad_edge=False)
    found.add_column("", no_wrap=True)
    for model in table:
        found.add_column(Text(folded(model)), justify="right", style="bold" * (model == marked), no_wrap=True)
    for name, *values in zip(map(_first, names), *(map(_narrow, row) for row in _values(table, names)), strict=True):
        found.add_row(Text(name), *map(Text, values))
    return found


def _values(table: Table, names: Sequence[str]) -> Iterator[list[str]]:
    for row in table.values():
        yield [_cell(row.get(name)) for name in names]


def _blocks(table: Table, width: int) -> Iterator[Table]:
    """Parts of a table, each with as many models as fit into so many letters, and one at least."""
    names = columns(table)
    room = full = width - max(map(_width, map(_first, names)), default=0)
    block: dict[str, Mapping[str, Cell]] = {}
    for (model, row), values in zip(table.items(), _values(table, names), strict=True):
        wide = 2 + max(_width(folded(model)), *(_width(_narrow(value)) for value in values), 0)
        if block and room < wide:
            yield block
            block, room = {}, full
        block[model] = row
        room -= wide
    yield block


def _first(name: str) -> str:
    return folded(name, 19)


def _narrow(cell: str) -> str:
    """An interval stands below its figure."""
    return cell.replace(" [", "\n[")


def folded(name: str, width: int = 9) -> str:
    r"""A long name in several lines, torn behind its separators alone.

    >>> folded("teacher-composition"), folded("student")
    ('teacher-\ncomposition', 'student')
    """
    lines = [""]
    for part in re.findall(r"[^\W_]+[\W_]*|[\W_]+", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    return max(map(len, text.splitlines() or [""]))


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _cell(value: Cell | None) -> str:
    if value is None or isinstance(value, int | str):
        return "" if value is None else str(value)
    return f"{value:.3f}"
