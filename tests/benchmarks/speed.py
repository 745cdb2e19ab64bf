"""What the parts of training take, by model, teachers and road, beside an update as the public code makes it.

    cd tests
    python -m benchmarks.speed                                            every job, of tiny-sd3
    python -m benchmarks.speed --jobs reference fused folded
    python -m benchmarks.speed --jobs folded --teachers 1 2 4 8 --images 8
    python -m benchmarks.speed --model tiles --images 24

All in one process, in turns, so that what else the machine does falls on all of them alike: medians over the rounds,
and their ratios to the first job. Seconds of the processor hardly depend on what else the machine does; on a GPU read
those of the clock. Gigabytes are those of tensors: between two updates, and at most within one.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import diffusers
import tiny
import torch
import transformers
from benchmarks.main_job import PACKAGES, machine, per_update
from benchmarks.memory import measured
from benchmarks.models import MODELS, Model
from benchmarks.reference import Reference
from benchmarks.sd35_step import random_adapter
from lightning import Callback
from rich.console import Console
from rich.table import Table

from flowopd.core import Anchored, Released, TransitionKL
from flowopd.preflight.forwards import connect, count_forwards
from flowopd.preflight.shapes import Shapes
from flowopd.records import EvaluationBatch
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import LoRATeacher
from flowopd.training import (
    AnchorCallback,
    FlowPolicy,
    GRPOTeacher,
    NFTTeacher,
    OPDStudent,
    RewardCallback,
    RolloutDataModule,
    TeacherCallback,
)
from flowopd.training.roads import sampling

STEPS, ADAPTERS = 10, 9


class Bench:
    """A model in a folder with adapters of random numbers, and a number of pictures, teachers and guidance."""

    def __init__(self, model: Model, folder: Path, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.base = model.write(folder / "base")
        shapes = Shapes(model.unread(self.base))
        self.adapters = [random_adapter(shapes, folder / str(seed), seed) for seed in range(ADAPTERS)]

    def tasks(self, teachers: int) -> list[str]:
        return [f"task{i}" for i in range(teachers)]

    def callbacks(self, teachers: int) -> list[Callback]:
        anchor, *others = (LoRATeacher(path, guidance_scale=self.options.guidance) for path in self.adapters)
        taught = zip(self.tasks(teachers), others, strict=False)
        return [AnchorCallback(anchor), *(TeacherCallback([task], teacher) for task, teacher in taught)]

    def data(
        self, teachers: int, siblings: int = 1, fused: bool = False, batch_size: int | None = None
    ) -> RolloutDataModule:
        images, prompts = self.options.images, {task: tiny.Words(task) for task in self.tasks(teachers)}
        evaluated = max(1, images // teachers)
        return RolloutDataModule(
            prompts, images // siblings, siblings, batch_size or images, fused=fused, evaluation_count=evaluated
        )

    def policy(self, kind: type[FlowPolicy], guidance: float, trained: int | None = None, objective=None) -> FlowPolicy:
        steps = None if trained is None else SpreadSteps(trained)
        sampler = Sampler(num_steps=STEPS, steps=steps, guidance_scale=guidance)
        return kind(self.model.unread(self.base), objective, sampler=sampler)

    def student(self, folded: bool, trained: int | None = None) -> FlowPolicy:
        objective = Anchored(TransitionKL(Released()), strength=0.04, weighting=Released())
        return self.policy(OPDStudent, 1.0 if folded else self.options.guidance, trained, objective)


class Seconds(NamedTuple):
    """Of the clock and of the processor."""

    clock: float
    processor: float

    @staticmethod
    def now() -> "Seconds":
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Seconds(time.perf_counter(), time.process_time())

    def until(self, later: "Seconds") -> "Seconds":
        return Seconds(later.clock - self.clock, later.processor - self.processor)


class Updates:
    """Updates under Lightning's trainer, as a fit makes them."""

    def __init__(self, policy: FlowPolicy, data: RolloutDataModule, callbacks: Sequence[Callback]) -> None:
        self.policy, self.data, self.callbacks = policy, data, list(callbacks)
        batches = data.prompts_per_iteration * data.group_size // data.batch_size * policy.batches_per_rollout()
        self.accumulate = batches
        self.forwards = per_update(count_forwards(policy, data, callbacks, accumulate=batches))

    def __call__(self, updates: int = 1) -> list[Seconds]:
        """What each takes."""
        watch = Watch()
        tiny.trainer(
            Path(), [*self.callbacks, watch], updates, accumulate_grad_batches=self.accumulate, gradient_clip_val=1.0
        ).fit(self.policy, self.data)
        return [start.until(end) for start, end in pairwise(watch.times)]


class Watch(Callback):
    """When every iteration began, and when the last one was done."""

    def __init__(self) -> None:
        self.times: list[Seconds] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.times.append(Seconds.now())

    def on_train_end(self, trainer, pl_module) -> None:
        self.times.append(Seconds.now())


class Repeated:
    """Any other piece of work."""

    forwards: float | None = None

    def __init__(self, work: Callable[[], object], forwards: float | None = None) -> None:
        self.work, self.forwards = work, forwards

    def __call__(self, times: int = 1) -> list[Seconds]:
        found = []
        for _ in range(times):
            began = Seconds.now()
            self.work()
            found.append(began.until(Seconds.now()))
        return found


def reference(bench: Bench, teachers: int) -> Repeated:
    """An update as the public code makes it."""
    options, tasks = bench.options, bench.tasks(teachers)
    backbone, anchor, *others = bench.model.unread(bench.base), *bench.adapters
    own = dict(zip(tasks, others, strict=False))
    shape = Shapes(backbone).latent
    model = Reference(bench.base, own, anchor, options.guidance, Sampler(STEPS).sigmas(), backbone.max_sequence_length)
    routed = [tasks[i % teachers] for i in range(options.images)]

    def update() -> None:
        model.update(
            [f"{task} {i}" for i, task in enumerate(routed)], routed, torch.randn(STEPS, options.images, *shape)
        )

    rows = (STEPS + (STEPS - 1) * (3 + 2)) * (1 if options.guidance == 1 else 2)
    return Repeated(update, options.images * rows)


def update_by(folded: bool, fused: bool, trained: int | None = None) -> Callable[[Bench, int], Updates]:
    def job(bench: Bench, teachers: int) -> Updates:
        return Updates(bench.student(folded, trained), bench.data(teachers, fused=fused), bench.callbacks(teachers))

    return job


def rewarded(kind: type[FlowPolicy]) -> Callable[[Bench, int], Updates]:
    def job(bench: Bench, teachers: int) -> Updates:
        policy = bench.policy(kind, bench.options.guidance)
        data = bench.data(1, siblings=bench.options.images // 2)
        return Updates(policy, data, [RewardCallback("brightness", tiny.Brightness())])

    return job


def part(work: Callable[[FlowPolicy, RolloutDataModule, int], object]) -> Callable[[Bench, int], Repeated]:
    """A part of an update of the default road, or what is done beside updates."""

    def job(bench: Bench, teachers: int) -> Repeated:
        policy, data = bench.student(folded=True, trained=2), bench.data(teachers, fused=True)
        connect(policy, data, bench.callbacks(teachers))
        policy.configure_model()
        count = iter(range(10**9))
        return Repeated(lambda: work(policy, data, next(count)))

    return job


def rollout(policy: FlowPolicy, data: RolloutDataModule, number: int) -> None:
    with sampling(policy):
        policy.rollout(data.draws()[0])


def label(policy: FlowPolicy, data: RolloutDataModule, number: int) -> None:
    draw = data.draws()[0]
    batch = policy.sampler.batch_at(draw.noise.start(), 0, policy.backbone.encode(draw.texts), draw.tasks)
    with sampling(policy):
        policy.signals.teaching.label(batch, policy.needs())


def encode(policy: FlowPolicy, data: RolloutDataModule, number: int) -> None:
    policy.backbone.encode([f"{i} of {number}" for i in range(data.batch_size)])


def evaluate(policy: FlowPolicy, data: RolloutDataModule, number: int) -> None:
    batch: EvaluationBatch = data.few_held_out(data.evaluation_count)
    policy.draw(batch.prompts, batch.noise)


JOBS: dict[str, Callable[[Bench, int], Updates | Repeated]] = {
    "reference": reference,
    "whole": update_by(folded=False, fused=False),
    "fused": update_by(folded=False, fused=True),
    "folded, all steps": update_by(folded=True, fused=True),
    "folded": update_by(folded=True, fused=True, trained=2),
    "folded, 1 step": update_by(folded=True, fused=True, trained=1),
    "folded, 4 steps": update_by(folded=True, fused=True, trained=4),
    "grpo": rewarded(GRPOTeacher),
    "nft": rewarded(NFTTeacher),
    "rollout": part(rollout),
    "labels of a step": part(label),
    "texts": part(encode),
    "evaluation": part(evaluate),
}
"""By name; ``folded`` is the default road: two steps of a rollout are trained."""


def main(words: Sequence[str] | None = None) -> dict:
    """Run, print a table, and return what it says."""
    options = parsed(words)
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(MODELS[options.model], Path(scratch), options)
        makers = {
            name if len(options.teachers) == 1 else f"{name}, {teachers} teachers": (JOBS[name], teachers)
            for name in options.jobs
            for teachers in options.teachers
        }
        bytes_of = {name: measured(lambda m=make, t=k: m(bench, t)) for name, (make, k) in makers.items()}
        jobs = {name: make(bench, teachers) for name, (make, teachers) in makers.items()}
        seconds = in_turns(jobs, options.rounds)
    found = {
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "options": {name: value for name, value in vars(options).items() if name != "folder"},
        "jobs": {name: told(job, seconds[name], bytes_of[name]) for name, job in jobs.items()},
    }
    show(found)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / f"speed_{options.model}.json").write_text(json.dumps(found, indent=1))
    return found


def quiet() -> None:
    """What lightning, diffusers and transformers say of every fit and pipeline is of no interest here."""
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def in_turns(jobs: Mapping[str, Updates | Repeated], rounds: int) -> dict[str, list[Seconds]]:
    """What every job takes in every round: one that warms up, then one that counts."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(job(2)[-1])
    return seconds


def told(job: Updates | Repeated, seconds: Sequence[Seconds], sizes: tuple[int, int]) -> dict[str, object]:
    between, most = sizes
    return {
        "seconds": [one._asdict() for one in seconds],
        "clock": statistics.median(one.clock for one in seconds),
        "processor": statistics.median(one.processor for one in seconds),
        "forwards": job.forwards,
        "gb_between": between / 1e9,
        "gb_most": most / 1e9,
    }


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny-sd3")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--images", type=int, default=4, help="pictures of an update")
    parser.add_argument("--teachers", type=int, nargs="+", default=[2], help="besides MAR")
    parser.add_argument(
        "--guidance", type=float, default=4.5, help="of the teachers and MAR, and of an unfolded student"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write speed_MODEL.json")
    return parser.parse_args(words)


def show(found: dict) -> None:
    about = "{model}, {images} pictures, guidance {guidance}".format(**found["options"])
    title = "{}, {threads} threads on {processor}".format(about, **found["machine"])
    table = Table("job", "seconds", "processor", "of the first", "forwards", "GB between", "GB at most", title=title)
    first = next(iter(found["jobs"].values()))["processor"]
    for name, job in found["jobs"].items():
        forwards = "" if job["forwards"] is None else f"{job['forwards'] / found['options']['images']:.1f}"
        sizes = (f"{job[size]:.4f}" for size in ("gb_between", "gb_most"))
        seconds = (f"{job[which]:.3f}" for which in ("clock", "processor"))
        table.add_row(name, *seconds, f"{job['processor'] / first:.3f}", forwards, *sizes)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
