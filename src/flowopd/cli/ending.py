"""What is said when a run ends: what got better, where everything is, and what may come next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from flowopd.report import write
from flowopd.report.runs import read_run
from flowopd.report.words import headline
from flowopd.training.ranks.folders import CHECKPOINTS

PLACES = {"adapter": "adapter", "pictures": "images/models.png", "table": "results.md"}
"""What a run leaves, below its folder."""


def report(folder: Path, ended: bool) -> None:
    """Write the report of a run, and say where it is; whatever is wrong with it is no fault of the run.

    Args:
        folder: of the run.
        ended: whether it came to its end; else nothing is said of a run without figures.
    """
    try:
        page = write([folder])
        if ended:
            _tell(folder)
        print(f"report    {page}", flush=True)
    except Exception as error:
        if ended:
            print(f"no report was written: {error}; see `flowopd report {folder}`", file=sys.stderr)


def _tell(folder: Path) -> None:
    run = read_run(folder)
    print(f"\n{headline(run)}\n" if run.ours in run.table else "")
    for name, place in PLACES.items():
        if (folder / place).exists():
            print(f"{name:<9} {folder / place}")
    if (folder / PLACES["adapter"]).exists():
        prompt = run.models.prompts[0] if run.models else "PROMPT"
        print(f"draw      {shlex.join(['flowopd', 'draw', prompt, '--adapter', str(folder)])}")
    checkpoint = folder / CHECKPOINTS / "last.ckpt"
    if run.fit and run.asked and checkpoint.exists():
        words = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)]
        print(f"go on     {shlex.join(['flowopd', 'fit', *words, '--trainer.max_epochs', str(2 * run.asked)])}")
