"""A run folder, read: finished, stopped in the middle, or still running."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowopd.evaluation import Shots

Curve = Sequence[tuple[int, float]]
"""(iteration, value) in order; iteration 0 is before the first update."""

FIGURES = ("metrics.csv", "results.csv")
BEFORE = ("start", "cold-start", "base")


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        name: what it is called on the page.
        folder: where it is.
        config: all of ``config.yaml``.
        curves: by metric, the finite numbers of ``metrics.csv``.
        table: by model, the cells of ``results.csv`` as they stand; not every column is a score.
        merge: the same of ``merge_report.csv``.
        shots: pictures along training, in order.
        models: the pictures of all models at the end.
        history: when it was begun and ended, with what.
        running: whether a process works in the folder.
        touched: when its newest figures were written.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    table: Mapping[str, Mapping[str, str]]
    merge: Mapping[str, Mapping[str, str]]
    shots: Sequence[Shots]
    models: Shots | None
    history: Sequence[Mapping[str, Any]]
    running: bool
    touched: datetime

    @property
    def ours(self) -> str:
        """What the trained model is called, as the run has said."""
        return str(self.facts().get("model") or "student")

    @property
    def iterations(self) -> int:
        """How many iterations are logged."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    @property
    def asked(self) -> int | None:
        """How many iterations were asked for."""
        asked = (self.config.get("trainer") or {}).get("max_epochs")
        return asked if isinstance(asked, int) and asked >= 0 else None

    @property
    def fit(self) -> bool:
        """Whether something was trained; a test has scores alone."""
        return any(not name.startswith(("test/", "val/")) for name in self.curves) and self.iterations > 0

    @property
    def state(self) -> str:
        """Where it stands."""
        if self.running:
            return "still running"
        if not self.fit:
            return "an evaluation"
        ended = self.asked is not None and self.iterations >= self.asked
        return "finished" if ended else "ended early" if (self.folder / "adapter").exists() else "stopped"

    @property
    def scores(self) -> list[str]:
        """Names of the scores, higher is better: the rewards of the evaluation, the average last."""
        known = {name.split("/", 1)[1] for name in self.curves if name.startswith(("val/", "test/"))}
        for one in self.callbacks("RewardCallback"):
            known |= {one["name"], *(f"{one['name']}/{part}" for part in one.get("columns") or ())}
        columns = next(iter(self.table.values()), {})
        order = [*columns, *sorted(known)] if columns else [*self._asked_for(), *sorted(known)]
        names = dict.fromkeys(name for name in order if name in known and name != "average")
        has_average = "average" in known or "average" in columns
        return [*names, *(["average"] if has_average else [])]

    def _asked_for(self) -> list[str]:
        return [one["name"] for one in self.callbacks("RewardCallback")]

    def callbacks(self, kind: str) -> list[Mapping[str, Any]]:
        """Arguments of the callbacks of a class, by the last part of its path."""
        found = (self.config.get("trainer") or {}).get("callbacks") or []
        found = [one for one in found if isinstance(one, Mapping)]
        return [
            one.get("init_args") or {} for one in found if str(one.get("class_path", "")).rpartition(".")[2] == kind
        ]

    def curve(self, score: str) -> Curve:
        """A score along training."""
        return self.curves.get(f"val/{score}", ())

    def number(self, model: str, score: str) -> float | None:
        """A score of the final table."""
        return _number(self.table.get(model, {}).get(score))

    def before(self, score: str) -> float | None:
        """What the trained model began with: the log's iteration 0, the cold start, else the base."""
        curve = self.curve(score)
        if curve and curve[0][0] == 0:
            return curve[0][1]
        known = [self.number(model, score) for model in BEFORE if model != self.ours]
        return next((value for value in known if value is not None), None)

    def after(self, score: str) -> float | None:
        """What it came to: the final table, else the newest figure."""
        final = self.number(self.ours, score)
        return final if final is not None or not self.curve(score) else self.curve(score)[-1][1]

    def teachers(self) -> list[str]:
        """Models of the table that are neither the trained one nor what it began with."""
        return [model for model in self.table if model not in (*BEFORE, self.ours)]

    def best_teacher(self, score: str) -> tuple[str, float] | None:
        """The teacher with the highest score."""
        known = [(model, self.number(model, score)) for model in self.teachers()]
        numbers = [(model, value) for model, value in known if value is not None]
        return max(numbers, key=lambda pair: pair[1], default=None)

    def seconds(self) -> float | None:
        """From begin to end, of every time it was begun; one that was killed counts to its newest figures."""
        total, begun = 0.0, None
        for line in self.history:
            if line.get("event") == "begin":
                begun = datetime.fromisoformat(line["time"])
            elif begun is not None:
                total, begun = total + (datetime.fromisoformat(line["time"]) - begun).total_seconds(), None
        if begun is not None:
            total += max((self.touched - begun).total_seconds(), 0.0)
        return total if self.history else None

    def facts(self) -> Mapping[str, Any]:
        """What is known of the last time it was begun."""
        return next((line for line in reversed(self.history) if line.get("event") == "begin"), {})

    def evaluation(self) -> dict[str, str]:
        """All that its scores depend on besides the model, by name."""
        data, model = _arguments(self.config.get("data")), _arguments(self.config.get("model"))
        sampler = _arguments(model.get("sampler"))
        found = {name: data.get(name) for name in ("evaluation_prompts", "evaluation_count")}
        found |= {"eval_steps": sampler.get("eval_steps")}
        found |= {f"reward {one['name']}": one for one in self.callbacks("RewardCallback")}
        return {name: json.dumps(value, sort_keys=True, default=str) for name, value in found.items()}


def has_figures(folder: Path) -> bool:
    """Whether a folder is that of a run that has something to show."""
    return (folder / "config.yaml").is_file() and any((folder / name).is_file() for name in FIGURES)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        ValueError: if it is none, or has no figures yet.
    """
    if not (folder / "config.yaml").is_file():
        why = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{str(folder)!r} is no run folder ({why}); expected one that a fit or a test has made")
    curves, table = _curves(folder / "metrics.csv"), _table(folder / "results.csv")
    if not curves and not table:
        raise ValueError(
            f"run folder {str(folder)!r} has no metrics.csv and no results.csv yet; wait for its first figures"
        )
    shots = folder / "images" / "shots"
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    if not isinstance(config, dict):
        raise ValueError(f"{str(folder / 'config.yaml')!r} is no configuration of a run")
    return Run(
        name=name or folder.absolute().name,
        folder=folder,
        config={str(key): value for key, value in config.items()},
        curves=curves,
        table=table,
        merge=_table(folder / "merge_report.csv"),
        shots=[
            Shots.read(path) for path in sorted(shots.glob("iteration_*.png")) if path.with_suffix(".json").exists()
        ],
        models=Shots.read(shots / "models.png") if (shots / "models.json").exists() else None,
        history=list(_lines(folder / "history.jsonl")),
        running=_is_held(folder),
        touched=_touched(folder),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several, called by the shortest ends of their paths that differ."""
    paths = [folder.absolute().parts for folder in folders]
    length = next(
        (n for n in range(1, max(map(len, paths), default=1)) if len({path[-n:] for path in paths}) == len(paths)), 1
    )
    return [read_run(folder, "/".join(path[-length:])) for folder, path in zip(folders, paths, strict=True)]


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric by iteration: epochs count from 0, and the start is logged as epoch -1."""
    curves: dict[str, dict[int, float]] = {}
    for row in _rows(path):
        epoch = _number(row.pop("epoch", None))
        row.pop("step", None)
        for name, cell in row.items():
            if (value := _number(cell)) is not None and epoch is not None:
                curves.setdefault(name, {})[int(epoch) + 1] = value
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def _table(path: Path) -> dict[str, dict[str, str]]:
    return {row.pop("model", ""): row for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: cell for name, cell in row.items() if name and cell is not None} for row in csv.DictReader(file)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of JSON; the last may be torn."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "time" in found:
            yield found


def _number(cell: Any) -> float | None:  # noqa: ANN401
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _arguments(value: Any) -> Mapping[str, Any]:  # noqa: ANN401
    found = value.get("init_args") if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a run that works there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a disk that knows no locks
    finally:
        os.close(handle)
    return False


def _touched(folder: Path) -> datetime:
    files = [folder / name for name in ("metrics.csv", "results.csv", "config.yaml")]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.exists()), UTC)
