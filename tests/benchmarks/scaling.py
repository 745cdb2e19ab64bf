"""What several ranks cost beside one: processor seconds of an update of as many pictures, summed over the ranks.

    cd tests
    python -m benchmarks.scaling

On the CPU by gloo. Ranks that wait use no processor, so that a share above one rank's is work that ranks do twice, or
that they do for each other; on idle cores the clock of an update is a rank's share of it.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import tiny
from benchmarks.main_job import PACKAGES, machine
from benchmarks.models import MODELS
from benchmarks.speed import Bench, Watch, quiet
from ranks import run_ranks
from rich.console import Console
from rich.table import Table

RUNS = {"one rank": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}


def main(words: Sequence[str] | None = None) -> dict:
    """Run, print a table, and return what it says."""
    options = parsed(words)
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(MODELS[options.model], Path(scratch), options)
        seconds = {name: summed(bench, Path(scratch, name), *run) for name, run in RUNS.items()}
    found = {
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "options": {name: value for name, value in vars(options).items() if name != "folder"},
        "processor": seconds,
    }
    table = Table("strategy", "ranks", "processor seconds of all ranks", "of one rank's")
    for name, (_, ranks) in RUNS.items():
        table.add_row(name, str(ranks), f"{seconds[name]:.2f}", f"{seconds[name] / seconds['one rank']:.2f}")
    Console(width=100).print(table)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "scaling.json").write_text(json.dumps(found, indent=1))
    return found


def summed(bench: Bench, folder: Path, strategy: str, ranks: int) -> float:
    """Median processor seconds of an update, summed over its ranks; the first update is left out."""
    folder.mkdir()

    def work() -> None:
        images, watch = bench.options.images, Watch()
        policy = bench.student(folded=not bench.options.whole, trained=None if bench.options.whole else 2)
        data = bench.data(2, fused=True, batch_size=images // ranks)
        accumulate = policy.batches_per_rollout()
        callbacks = [*bench.callbacks(2), watch]
        tiny.trainer(
            folder,
            callbacks,
            bench.options.updates + 1,
            strategy=strategy,
            devices=ranks,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        ).fit(policy, data)
        (folder / f"{policy.global_rank}.json").write_text(json.dumps([one.processor for one in watch.times]))

    if ranks == 1:
        work()
    else:
        run_ranks(work, ranks, timeout=3600)
    times = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    each = [sum(rank[i + 1] - rank[i] for rank in times) for i in range(1, bench.options.updates + 1)]
    return statistics.median(each)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny-sd3")
    parser.add_argument("--images", type=int, default=8, help="pictures of an update, of all ranks")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="all steps are trained, by a guided student")
    parser.add_argument("--folder", type=Path, help="where to write scaling.json")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
