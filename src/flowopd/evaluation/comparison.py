"""Tables of several models on several benchmarks, computed from the records alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flowopd.core.names import perhaps
from flowopd.core.ranges import above
from flowopd.evaluation.benchmark import Benchmark
from flowopd.evaluation.drift import drift_changes
from flowopd.evaluation.ledger import Picture
from flowopd.evaluation.paper import TABLES, average, known_table
from flowopd.evaluation.resampling import (
    RESAMPLES,
    Estimate,
    Interval,
    best_of_n,
    estimate,
    macro,
    mean,
    mean_of,
    spread,
    worst_tenth,
)
from flowopd.evaluation.tables import Cell, Table, markdown_table

Row = dict[str, Cell]


@dataclass(frozen=True)
class Summary:
    """The table that is read first: some scores of some benchmarks, and their average.

    Args:
        columns: what is shown, as ``<benchmark>/<score>``, by the name it is shown under; of several, their mean.
        divided_by: what a column is divided by in the average,  mean_c (score_c / divisor_c); default: 1.
        average: whether the table has one.
        paper: a table of the paper (``table2``, ``table3``, ``table4``) whose figures stand below ours.

    Raises:
        ValueError: on an unknown name, or a divisor that is not above 0.
    """

    columns: dict[str, str | list[str]]
    divided_by: dict[str, float] = field(default_factory=dict)
    average: bool = True
    paper: str | None = None

    def __post_init__(self) -> None:
        above(0.0, **{f"divided_by.{name}": value for name, value in self.divided_by.items()})
        for name in self.divided_by:
            if name not in self.columns:
                raise ValueError(f"divided_by names {name!r}{perhaps(name, self.columns)}, which is no column")
        if self.paper is not None:
            known_table(self.paper)

    def check(self, benchmarks: Mapping[str, Benchmark]) -> None:
        """Raise unless every column is a score of a benchmark of this run.

        Raises:
            ValueError: naming the one that is perhaps meant.
        """
        for column, path in [(name, path) for name in self.columns for path in self.paths(name)]:
            name, _, score = path.partition("/")
            if name not in benchmarks:
                raise ValueError(
                    f"column {column!r} is of benchmark {name!r}{perhaps(name, benchmarks)}, which this run does not "
                    f"have; it has {', '.join(map(repr, benchmarks))}"
                )
            known = [*benchmarks[name].rewards, *benchmarks[name].judges]
            if score.partition("/")[0] not in known:
                raise ValueError(f"column {column!r}: benchmark {name!r} has no score {score!r}{perhaps(score, known)}")

    def paths(self, column: str) -> list[str]:
        """What a column is the mean of."""
        paths = self.columns[column]
        return [paths] if isinstance(paths, str) else paths


@dataclass(frozen=True)
class Sheet:
    """What a model scored on a benchmark, prompt by prompt.

    Args:
        name: of the benchmark.
        benchmark: the benchmark.
        groups: of P prompts.
        scores: by name, (P, n) float64, NaN where there is none.
        figures: means of what pictures drift by.
        failed: how many scores of rewards and judges failed.
    """

    name: str
    benchmark: Benchmark
    groups: Sequence[str]
    scores: Mapping[str, Tensor]
    figures: Mapping[str, float]
    failed: int

    @staticmethod
    def of(name: str, benchmark: Benchmark, pictures: Sequence[Picture]) -> Sheet:
        """The records of all pictures of a benchmark, those of further prompts left out."""
        pictures = [picture for picture in pictures if picture.prompt < benchmark.count]
        names = dict.fromkeys(score for picture in pictures for score in picture.scores)
        scores = {
            score: torch.full((benchmark.count, benchmark.images_per_prompt), math.nan).double() for score in names
        }
        groups, failed = [""] * benchmark.count, 0
        for picture in pictures:
            groups[picture.prompt] = picture.group
            for score, value in picture.scores.items():
                scores[score][picture.prompt, picture.image] = math.nan if value is None else value
                failed += value is None
        kinds = pictures[0].figures if pictures else {}
        figures = {kind: sum(picture.figures[kind] for picture in pictures) / len(pictures) for kind in kinds}
        return Sheet(name, benchmark, groups, scores, figures, failed)

    def overall(self, score: str) -> Estimate:
        """A score over all pictures, or over groups that count alike."""
        return self._estimate(score, macro(list(self.rows().values())) if score in self.benchmark.macro else mean)

    def best(self, score: str) -> Estimate:
        """Mean over prompts of the best picture."""
        return self._estimate(score, best_of_n)

    def worst(self, score: str) -> Estimate:
        """Mean over the worst tenth of the prompts."""
        return self._estimate(score, worst_tenth)

    def spread(self, score: str) -> Estimate:
        """How far the pictures of a prompt differ in score."""
        return self._estimate(score, spread)

    def group(self, score: str, rows: Sequence[int]) -> Estimate:
        """A score over one group, by its rows."""
        return self._estimate(score, macro([rows]))

    def rows(self) -> dict[str, list[int]]:
        """Rows of every group, in the order of its first prompt."""
        names = dict.fromkeys(self.groups)
        return {name: [row for row, group in enumerate(self.groups) if group == name] for name in names}

    def _estimate(self, score: str, statistic: object) -> Estimate:
        nothing = torch.full((self.benchmark.count, 1), math.nan).double()
        return estimate(self.scores.get(score, nothing), statistic, self.name)  # type: ignore[arg-type]

    def names(self) -> list[str]:
        """Rewards, and then judges."""
        return [*self.benchmark.rewards, *self.benchmark.judges]


Sheets = Mapping[str, Mapping[str, Sheet]]
"""By benchmark and by model."""


def compare(sheets: Sheets, summary: Summary | None, against: Sequence[str]) -> dict[str, Table]:
    """All tables, by title.

    Args:
        sheets: of every benchmark, its models in one order; drift is measured against the first.
        summary: the first table, if it is wanted.
        against: models that the others are compared with, pair by pair.
    """
    tables: dict[str, Table] = {}
    if summary is not None:
        tables["summary"] = summary_table(sheets, summary)
        for reference in against:
            tables[f"summary, minus {reference}"] = _minus(
                reference, summary_estimates(sheets, summary), _whole(sheets)
            )
    for name, models in sheets.items():
        tables[name] = {model: _scores(sheet) for model, sheet in models.items()}
        if len(next(iter(models.values())).rows()) > 1:
            tables[f"{name}, by group"] = {model: _groups(sheet) for model, sheet in models.items()}
        for reference in against:
            overall = {m: {score: sheet.overall(score) for score in sheet.names()} for m, sheet in models.items()}
            tables[f"{name}, minus {reference}"] = _minus(reference, overall, _size([next(iter(models.values()))]))
        tables[f"{name}, stability"] = stability(models)
    return tables


def _size(sheets: Iterable[Sheet]) -> Row:
    """How many prompts, and how many seeds of each; where that differs, how many pictures in all."""
    benchmarks = [sheet.benchmark for sheet in sheets]
    prompts, seeds = sum(one.count for one in benchmarks), {one.images_per_prompt for one in benchmarks}
    pictures = sum(one.count * one.images_per_prompt for one in benchmarks)
    row: Row = {"prompts": prompts}
    return row | ({"seeds": seeds.pop()} if len(seeds) == 1 else {"pictures": pictures})


def _scores(sheet: Sheet) -> Row:
    n = sheet.benchmark.images_per_prompt
    row = _size([sheet])
    row |= {score: sheet.overall(score).interval() for score in sheet.names()}
    row |= {f"{score}, best of {n}": sheet.best(score).interval() for score in sheet.benchmark.best_of_n}
    return row | ({"failed": sheet.failed} if sheet.failed else {})


def _groups(sheet: Sheet) -> Row:
    return _size([sheet]) | {
        f"{score}/{group}": sheet.group(score, rows).interval()
        for score in sheet.benchmark.rewards
        for group, rows in sheet.rows().items()
    }


def _minus(reference: str, models: Mapping[str, Mapping[str, Estimate]], size: Row) -> Table:
    """Paired differences to one model, of every other one."""
    base = models[reference]
    return {
        model: size | {name: (one - base[name]).interval() for name, one in row.items()}
        for model, row in models.items()
        if model != reference
    }


def stability(models: Mapping[str, Sheet]) -> Table:
    """Whether a model is good everywhere, and whether it cheats: a row per model.

    The worst tenth of the prompts; how far the pictures of a prompt differ in score and, as ``diversity``, in looks;
    what judges that nobody was trained on say against the first model, paired; and how pictures drift from the first
    model's, as shares of its figures (the dark fraction: as a difference).
    """
    base = next(iter(models.values()))
    rows: dict[str, Row] = {}
    for model, sheet in models.items():
        row = _size([sheet])
        row |= {f"{score}, worst tenth": sheet.worst(score).interval() for score in sheet.benchmark.rewards}
        if sheet.benchmark.images_per_prompt > 1:
            row |= {f"{score}, spread over seeds": sheet.spread(score).interval() for score in sheet.benchmark.rewards}
        for judge in sheet.benchmark.judges:
            row[f"{judge} (judge) minus base"] = (sheet.overall(judge) - base.overall(judge)).interval()
        row |= {f"{name} change": value for name, value in drift_changes(sheet.figures, base.figures).items()}
        rows[model] = row
    return rows


def summary_estimates(sheets: Sheets, summary: Summary) -> dict[str, dict[str, Estimate]]:
    """Every column of a summary and ``average``, by model."""
    rows: dict[str, dict[str, Estimate]] = {}
    for model in next(iter(sheets.values())):
        row = {name: mean_of([_at(sheets, path, model) for path in summary.paths(name)]) for name in summary.columns}
        if summary.average:
            row["average"] = mean_of([one / summary.divided_by.get(name, 1.0) for name, one in row.items()])
        rows[model] = row
    return rows


def summary_table(sheets: Sheets, summary: Summary) -> Table:
    """The summary of every model, and the paper's figures below."""
    ours = summary_estimates(sheets, summary)
    size = _whole(sheets)
    table = {model: size | {name: one.interval() for name, one in row.items()} for model, row in ours.items()}
    for model, figures in TABLES[summary.paper].items() if summary.paper else ():
        row: Row = dict(figures)
        mean_by_rule: Row = {"average": average(figures, summary.divided_by)} if summary.average else {}
        table[f"paper: {model}"] = row | mean_by_rule
    return table


def _whole(sheets: Sheets) -> Row:
    """The size of all benchmarks together."""
    return _size(next(iter(models.values())) for models in sheets.values())


def _at(sheets: Sheets, path: str, model: str) -> Estimate:
    name, _, score = path.partition("/")
    return sheets[name][model].overall(score)


def write_comparison(tables: Mapping[str, Table], folder: Path) -> None:
    """Write ``results.md`` with all tables, and ``tables/<title>.csv`` of each."""
    notes = (
        f"In brackets: 95 % intervals by {RESAMPLES} resamples of the prompts. All models drew from the same noise and "
        "are resampled alike, so that differences are paired. `seeds` is the number of pictures per prompt."
    )
    parts = [notes, *(f"## {title}\n\n{markdown_table(table)}" for title, table in tables.items())]
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for title, table in tables.items():
        name = title.replace(", ", "-").replace(" ", "-").replace("/", "-")
        with (folder / "tables" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(_flat(table))


def _flat(table: Table) -> list[list[object]]:
    """Rows for a machine: an interval is three columns, of all digits."""
    rows = [_spread_out(model, row) for model, row in table.items()]
    header: list[object] = list(dict.fromkeys(name for row in rows for name in row))
    return [header, *([row.get(str(name), "") for name in header] for row in rows)]


def _spread_out(model: str, row: Mapping[str, Cell]) -> dict[str, object]:
    flat: dict[str, object] = {"model": model}
    for name, value in row.items():
        if isinstance(value, Interval):
            flat |= {name: value.value, f"{name}, low": value.low, f"{name}, high": value.high}
        else:
            flat[name] = value
    return flat
