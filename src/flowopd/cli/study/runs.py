"""The runs of a study: which are done, and the others, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowopd.cli.run import STAGES
from flowopd.cli.study.facts import Facts, facts_of
from flowopd.cli.study.file import Stage, Study
from flowopd.cli.study.table import read_results, trained
from flowopd.training.callbacks.memory import SCORES
from flowopd.training.ranks.folders import CHECKPOINTS, numbered

COMMAND = (sys.executable, "-m", "flowopd")

PAUSE = 0.2
"""Seconds between two looks at what runs."""

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
GOES_ON = "goes on"

SHARED = "scores_of_all_runs"
"""Where runs of a study find scores of base and teachers that another one has measured."""


@dataclass
class Run:
    """One seed of a stage.

    Args:
        stage, seed: which.
        state: one of four.
        how: what ``look`` said.
        why: it failed.
        seconds: that it took, all its parts together, up to its last start.
        facts: what it is made of.
        began: its last start, in seconds since 1970.
        process: while it runs.
    """

    stage: Stage
    seed: int
    state: str = WAITING
    how: str = ""
    why: str = ""
    seconds: float = 0.0
    facts: Facts = field(default_factory=dict)
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.stage.run(self.seed)

    @property
    def checkpoint(self) -> Path:
        """Where a fit that was cut off goes on."""
        return self.folder / CHECKPOINTS / "last.ckpt"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record(self) -> Path:
        """What the run was made of."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def remembered(self) -> dict[str, Any]:
        """What was recorded; empty if nothing was, or it cannot be read."""
        try:
            content: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        whole = (
            self.folder.is_dir()
            and isinstance(content, dict)
            and content.keys() >= {"done", "seconds", "began", "facts"}
        )
        return content if whole else {}

    def remember(self, done: bool = False) -> None:
        """Record what the run is made of, and how far it is."""
        content = {"done": done, "seconds": round(self.seconds, 1), "began": self.began, "facts": self.facts}
        partial = self.record.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self.record)

    def look(self, facts: Facts) -> str:
        """What is to be done, by what was done: ``DONE``, or a word on how it will run."""
        self.facts, before = facts, self.remembered()
        if not before:
            return "new"
        if changed := [name for name in {**facts, **before["facts"]} if facts.get(name) != before["facts"].get(name)]:
            return f"anew: {changed[0]} changed"
        self.seconds = before["seconds"]
        if before["done"]:
            return DONE
        if self.stage.verb == "fit" and self.checkpoint.exists():
            self.seconds += max(0.0, self.checkpoint.stat().st_mtime - before["began"])
            return GOES_ON
        return "anew: cut off"

    def start(self, adapters: Mapping[str, Path], scores: Path, threads: int | None) -> None:
        """Start the run's process; what an earlier one left that is of no use is set aside.

        Args:
            adapters: of the stages that it uses.
            scores: folder of scores that all runs share.
            threads: of the process; None for as many as it takes.
        """
        words = self.stage.words(self.seed)
        if self.how == GOES_ON:
            words.append(f"--ckpt_path={self.checkpoint}")
        else:
            self.seconds = 0.0
            if self.folder.exists():
                aside = numbered(self.folder.with_name(f"{self.folder.name}_earlier"))
                self.folder.rename(next(path for path in aside if not path.exists()))
        self.stage.folder.mkdir(parents=True, exist_ok=True)
        self.state, self.began = RUNNING, time.time()
        self.remember()  # the folder is the run's to make: by its record a run that was cut off is known
        environment = os.environ | {STAGES: json.dumps({name: str(path) for name, path in adapters.items()})}
        environment |= {SCORES: str(scores)}
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with self.log.open("ab") as log:
            log.write(f"$ flowopd {' '.join(words)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowopd.cli.study.tied", str(os.getpid()), *COMMAND, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether the run has ended just now."""
        if self.process is None or self.process.poll() is None:
            return False
        self.seconds += time.time() - self.began
        self.state = DONE if self.process.returncode == 0 else FAILED
        if self.state == DONE:
            self.remember(done=True)
        else:
            self.why = f"exit code {self.process.returncode}, {_last_line(self.log)}"
        self.process = None
        return True

    def took(self) -> float:
        """Seconds up to now."""
        return self.seconds + (time.time() - self.began if self.process is not None else 0.0)

    def scores(self) -> dict[str, float] | None:
        """Of the first model that is asked for, else of the trained one, once the run is done."""
        table = read_results(self.folder) if self.state == DONE else {}
        return table.get(self.stage.rows[0] if self.stage.rows else trained(table))


class Conductor:
    """Runs what is not done, some at a time, as soon as what it uses is done.

    Args:
        study: what to run.
        configs: resolved, by stage.
        jobs: runs at a time.
    """

    def __init__(self, study: Study, configs: Mapping[str, dict[str, Any]], jobs: int = 1) -> None:
        self.study = study
        self.configs = configs
        self.jobs = jobs
        self.told: Callable[[Stage], None] = lambda _: None
        self.runs = [Run(stage, seed) for stage in study.stages for seed in stage.seeds]

    def of(self, stage: Stage) -> list[Run]:
        """The runs of a stage."""
        return [run for run in self.runs if run.stage is stage]

    def uses(self, run: Run) -> list[Run]:
        """The runs whose adapters a run uses."""
        needed = [self.study.stage(name) for name in run.stage.needs]
        return [other for stage in needed for other in self.of(stage) if other.seed == stage.seed_for(run.seed)]

    def plan(self) -> Iterator[tuple[Stage, str, list[int]]]:
        """What would become of the runs of every stage, those of one fate together."""
        for stage in self.study.stages:
            fates: dict[str, list[int]] = {}
            for run in self.of(stage):
                fates.setdefault(self._fate(run), []).append(run.seed)
            yield from ((stage, how, seeds) for how, seeds in fates.items())

    def _fate(self, run: Run) -> str:
        how = run.look(self._facts(run))
        waits = dict.fromkeys(other.stage.name for other in self.uses(run) if other.state != DONE)
        run.state = DONE if how == DONE and not waits else WAITING
        return f"after {', '.join(waits)}" if waits else how

    def conduct(self, told: Callable[[Stage], None]) -> None:
        """Run all that can be run; whatever interrupts this stops what runs.

        Args:
            told: called with a stage of which something has changed.
        """
        self.told = told
        try:
            while any(run.state in (WAITING, RUNNING) for run in self.runs):
                self._begin()
                for run in self.runs:
                    if run.poll():
                        self.told(run.stage)
                time.sleep(PAUSE)
        finally:
            self._stop()

    def _stop(self) -> None:
        """Let whatever runs write its checkpoint, and end."""
        running = [run.process for run in self.runs if run.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def _begin(self) -> None:
        for run in [run for run in self.runs if run.state == WAITING]:
            used = self.uses(run)
            if lost := [other for other in used if other.state == FAILED]:
                run.state, run.why = FAILED, f"uses {lost[0].stage.name} seed {lost[0].seed}, which failed"
                self.told(run.stage)
            elif all(other.state == DONE for other in used):
                self._take_up(run)

    def _take_up(self, run: Run) -> None:
        run.how = run.how or run.look(self._facts(run))
        if run.how == DONE:
            run.state = DONE
        elif sum(other.state == RUNNING for other in self.runs) < self.jobs:
            threads = max(1, (os.cpu_count() or 1) // self.jobs) if self.jobs > 1 else None  # alone, a run knows best
            run.start(self.study.adapters(run.stage, run.seed), self.study.folder / SHARED, threads)
        else:
            return
        self.told(run.stage)

    def _facts(self, run: Run) -> Facts:
        return facts_of(self.study, run.stage, run.seed, self.configs[run.stage.name])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[-200:] if lines else "without a word"
