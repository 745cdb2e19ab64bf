"""One log per run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override


class MetricsFile(Logger):
    """Writes ``metrics.csv``: a row per step, a column per metric; always whole on the disk.

    A run that goes on keeps the rows up to its checkpoint, and drops those that it will write again.

    Args:
        path: of the file.
        steps: rows of earlier steps stay.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        super().__init__()
        self.path = path
        self.rows = {step: row for step, row in _read(path).items() if step < steps}
        self._written = False

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = len(self.rows) if step is None else step
        self.rows.setdefault(step, {}).update(metrics)
        self._written = False

    @override
    @rank_zero_only
    def save(self) -> None:
        if self._written or not self.rows:
            return
        columns = sorted({"step"}.union(*self.rows.values()))
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**self.rows[step], "step": step} for step in sorted(self.rows))
        partial.replace(self.path)
        self._written = True

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of a log that is there, as they stand; those of one step become one."""
    rows: dict[int, dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                known = {name: value for name, value in row.items() if value and name != "step"}
                rows.setdefault(int(row["step"]), {}).update(known)
    return rows
