"""``flowopd study``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.live import Live
from rich.text import Text

from flowopd.cli.main import heeding
from flowopd.cli.recipes import located

if TYPE_CHECKING:
    from flowopd.cli.study.file import Stage, Study
    from flowopd.cli.study.runs import Conductor, Run
    from flowopd.cli.study.table import Row

HELP = """Run the stages of a study, each an ordinary command, once for every seed; then print a table over them.

A run that is done is skipped while its resolved configuration and the contents of the files that this names are what
they were. A fit that was cut off goes on from its last checkpoint. A stage that fails loses only those that use it.
Nothing is deleted: what is made anew leaves the earlier run beside it, as seed_0_earlier."""

FILE = """a study:
  folder: runs/mine      its runs are <folder>/<stage>/seed_<n>, its table study.md and study.csv; default: runs/<file>
  seeds: [0, 1, 2]       of every stage that names none; default: [0]
  rows: [student]        models of each run's results.csv in the table; default: the trained one, which is the last;
                         base and teachers are the first stage's
  stages:
    - name: cold_start
      run: fit           or validate, test, predict; default: fit
      configs: [tiles/cold_start_sft]    as after --config: files, or names of recipes
      overrides: {trainer.max_epochs: 50}
    - name: student
      configs: [tiles/opd]
      overrides:
        model.init_args.start: "${stage:cold_start}"    the adapter of that stage, of the same seed or its only one
      seeds: [0, 1]      of this stage alone; so are rows and folder"""


def main() -> None:
    """Entry point of ``flowopd study``."""
    words = _parser().parse_args(sys.argv[2:])
    from flowopd.cli.study.file import read_study  # not before --help

    with heeding():
        run_study(read_study(Path(located(words.config))), words.jobs, words.dry_run)


def _parser() -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter

    reads = ArgumentParser(
        prog="flowopd study",
        description=HELP,
        epilog=FILE,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    reads.add_argument("--config", required=True, metavar="FILE", help="the study, as below, or the name of one")
    reads.add_argument("--jobs", type=PositiveInt, default=1, metavar="K", help="runs at a time; default: 1")
    reads.add_argument("--dry_run", action="store_true", help="say what would run, and what is done")
    return reads


def run_study(study: Study, jobs: int = 1, dry_run: bool = False) -> None:
    """Build all stages, run what is not done, and write the table.

    Raises:
        SystemExit: with code 1, if a run failed; with code 2, if a stage cannot be built.
        ValueError: if another process works on the study.
    """
    from flowopd.cli.study.facts import built
    from flowopd.cli.study.runs import Conductor
    from flowopd.training.ranks.folders import Claim, check_place

    for stage in study.stages:
        check_place(stage.folder)
    configs = {stage.name: built(stage) for stage in study.stages}
    conductor = Conductor(study, configs, jobs)
    board = Board(conductor)
    if dry_run:
        for stage, how, seeds in conductor.plan():
            print(f"{stage.name:<{board.width}}  seeds {', '.join(map(str, seeds))}: {how}")
        return
    study.folder.mkdir(parents=True, exist_ok=True)
    claim = Claim.of_run(study.folder)
    try:
        with board:
            conductor.conduct(board.tell)
        _finish(study, conductor)
    finally:
        claim.release()


class Board:
    """One line for every stage: how far its runs are, minutes, the mean of the main score.

    On a terminal they stay in place; elsewhere a line is printed when something has changed.
    """

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self.stages = conductor.study.stages
        self.width = max(len(stage.name) for stage in self.stages)
        self._live = Live(get_renderable=self._all, refresh_per_second=1) if sys.stdout.isatty() else None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, stage: Stage) -> None:
        """Say how far a stage is."""
        if self._live is None:
            print(self.line(stage), flush=True)

    def line(self, stage: Stage) -> str:
        """How far a stage is."""
        runs = self.conductor.of(stage)
        counts = {state: sum(run.state == state for run in runs) for state in ("done", "running", "failed")}
        said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "waiting"
        minutes = sum(run.took() for run in runs) / 60
        return f"{stage.name:<{self.width}}  {said} of {len(runs)}  {minutes:.1f} min  {_main_score(runs)}".rstrip()

    def _all(self) -> Text:
        return Text("\n".join(map(self.line, self.stages)), no_wrap=True, overflow="ellipsis")


def _main_score(runs: Sequence[Run]) -> str:
    """The mean of the average, or of the first score."""
    from flowopd.cli.study.table import shown

    found = [scores for run in runs if (scores := run.scores())]
    if not found:
        return ""
    name = "average" if "average" in found[0] else next(iter(found[0]))
    return f"{name} {shown([scores[name] for scores in found if name in scores])}"


def _finish(study: Study, conductor: Conductor) -> None:
    from flowopd.cli.study.table import printed, write_table

    rows = list(_rows(study, conductor))
    write_table(rows, study.folder / "study")
    print(f"\n{printed(rows)}\n\nwritten: {study.folder / 'study.md'} and study.csv")
    _report(study, conductor)
    if failed := [run for run in conductor.runs if run.state == "failed"]:
        for run in failed:
            print(f"failed: {run.stage.name} seed {run.seed}: {run.why}; see {run.log}", file=sys.stderr)
        raise SystemExit(1)


def _report(study: Study, conductor: Conductor) -> None:
    """Write a page of all runs side by side; whatever is wrong with it is no fault of the study."""
    from flowopd.report import write
    from flowopd.report.runs import has_figures

    folders = [run.folder for run in conductor.runs if has_figures(run.folder)]
    try:
        if folders:
            print(f"report: {write(folders, study.folder / 'report', study.folder.name)}")
    except Exception as error:
        print(f"no report was written: {error}", file=sys.stderr)


def _rows(study: Study, conductor: Conductor) -> Iterator[Row]:
    """Base, teachers and cold start of the first stage that has a table, then the rows of every stage."""
    from flowopd.cli.study.table import Row, read_results, trained

    done = {stage.name: [run for run in conductor.of(stage) if run.state == "done"] for stage in study.stages}
    tables = {name: [read_results(run.folder) for run in runs] for name, runs in done.items()}
    if (first := next((stage for stage in study.stages if any(tables[stage.name])), None)) is not None:
        found = tables[first.name]
        shown = set(first.rows) or {trained(table) for table in found}
        for model in dict.fromkeys(model for table in found for model in table if model not in shown):
            yield Row(model, len(first.seeds), None, [table[model] for table in found if model in table])
    for stage in study.stages:
        hours = sum(run.seconds for run in done[stage.name]) / 3600
        found = tables[stage.name]
        for model in stage.rows or ("",):
            name = stage.name if len(stage.rows) < 2 else f"{stage.name}: {model}"
            models = [(table, model or trained(table)) for table in found]
            scores = [table.get(one, {}) for table, one in models if one in table or not any(found)]
            yield Row(name, len(stage.seeds), hours, scores)
