"""The main job beside the recipe that it replaced: what each takes until it is good, and how good it ends.

Both run in one process, one after the other, on the same held-out prompts:

    python tests/benchmarks/main_job.py
    python tests/benchmarks/main_job.py --updates 20 --every 10        a try

Seconds are those of rollouts and updates; evaluations and files are left out. Seconds of the processor hardly depend on
what else the machine does; those of the clock do.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from lightning import Callback
from rich.console import Console
from rich.table import Table

from flowopd.cli import run as command_line
from flowopd.preflight.forwards import DECODED, TRAINED, count_forwards
from flowopd.training import ImageGrid, ResultsTable

CONFIGS = Path(__file__).parents[2] / "configs" / "tiles"
RECIPES = {"main job": ["opd.yaml"], "former": ["opd.yaml", "ablations/former.yaml"]}
FIGURES = ("average", "composition", "text", "crispness")
WORK = ("updates", "pictures", "forwards", "seconds", "cpu_seconds")
PACKAGES = ("flowopd", "torch", "lightning", "diffusers", "peft", "transformers")


class Clock(Callback):
    """What training took until every evaluation, and what that found."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0
        self._last = (0.0, 0.0)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._last = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds += now[0] - self._last[0]
        self.cpu_seconds += now[1] - self._last[1]
        self._last = now

    def on_validation_end(self, trainer, pl_module) -> None:
        found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in FIGURES}
        took = {"updates": trainer.global_step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        self.curve.append(took | found)


class Job(command_line.FlowCLI):
    """A fit with a clock, and without what is drawn and tabled besides."""

    done: "list[Job]" = []  # noqa: RUF012 - the command line makes them

    def instantiate_trainer(self, **kwargs):
        trainer = super().instantiate_trainer(**kwargs)
        self.clock = Clock()
        kept = [own for own in trainer.callbacks if not isinstance(own, ResultsTable | ImageGrid)]
        trainer.callbacks = [self.clock, *kept]  # lightning wants checkpoints last
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        accumulate = self.trainer.accumulate_grad_batches
        counts = count_forwards(self.model, self.datamodule, self.trainer.callbacks, accumulate=accumulate)
        self.forwards = per_update(counts)
        super()._run_subcommand(subcommand)
        Job.done.append(self)


def per_update(counts: Mapping[str, float]) -> float:
    """Forwards of one image in an update, of student, teachers and anchor; a backward counts as two."""
    return sum(rows for name, rows in counts.items() if name != DECODED) + 2 * counts[TRAINED]


def main(words: Sequence[str] | None = None) -> dict:
    """Run, print a table, and return what it says."""
    options = parsed(words)
    with tempfile.TemporaryDirectory() as scratch:
        curves = {name: run(files, options, Path(scratch, name)) for name, files in RECIPES.items()}
    found = {
        "target": options.target,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "reached": {name: first(curve, options.target) for name, curve in curves.items()},
        "curves": curves,
    }
    show(found)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "main_job.json").write_text(json.dumps(found, indent=1))
    return found


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.86, help="average of composition, text and crispness")
    parser.add_argument("--updates", type=int, help="of each recipe; default: as many as it has")
    parser.add_argument("--every", type=int, default=25, help="updates between two evaluations")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write main_job.json")
    return parser.parse_args(words)


def run(files: Sequence[str], options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The curve of a recipe: work and figures at every evaluation."""
    words = [word for file in files for word in ("--config", str(CONFIGS / file))]
    words += [f"--seed_everything={options.seed}", f"--trainer.default_root_dir={folder}", "--trainer.logger=false"]
    words += [
        f"--trainer.check_val_every_n_epoch={options.every}",
        f"--data.init_args.evaluation_count={options.prompts}",
    ]
    words += [] if options.updates is None else [f"--trainer.max_epochs={options.updates}"]
    sys.argv = ["flowopd", "fit", *words]
    command_line.run(Job)
    job = Job.done.pop()
    each = {"pictures": job.datamodule.prompts_per_iteration * job.datamodule.group_size, "forwards": job.forwards}
    return [point | {name: point["updates"] * count for name, count in each.items()} for point in job.clock.curve]


def first(curve: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first evaluation whose average is the target or more."""
    return next((point for point in curve if point["average"] >= target), None)


def machine() -> dict[str, object]:
    models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    processor = models[0].split(":")[1].strip() if models else platform.processor()
    return {
        "system": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def show(found: dict) -> None:
    title = "{processor}, {cores} cores, {threads} of torch's threads".format(**found["machine"])
    table = Table("recipe", "until", *(name.replace("_", " ") for name in (*WORK, *FIGURES)), title=title)
    for name, curve in found["curves"].items():
        for until, point in ((f"{found['target']:g}", found["reached"][name]), ("its end", curve[-1])):
            table.add_row(name, until, *cells(point))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def cells(point: Mapping[str, float] | None) -> list[str]:
    if point is None:
        return ["not reached"]
    return [*(f"{point[name]:.0f}" for name in WORK), *(f"{point[name]:.3f}" for name in FIGURES)]


if __name__ == "__main__":
    main()
