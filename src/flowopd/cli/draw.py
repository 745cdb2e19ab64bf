"""``flowopd draw``: prompts of one's own, by the base and by adapters side by side."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

HELP = """Draw prompts by the base and by adapters on it, all from the same noise: a PNG for each, and sheet.png. How to
draw is read beside the first adapter, from its run or from its card; without adapters the built-in world draws."""


def main() -> None:
    """Entry point of ``flowopd draw``."""
    words = _parser().parse_args(sys.argv[2:])
    from flowopd.cli.drawing import draw_words  # not before --help

    draw_words(words)


def _parser() -> ArgumentParser:
    reads = ArgumentParser(prog="flowopd draw", description=HELP, exit_on_error=False, allow_abbrev=False)
    reads.add_argument("prompts", nargs="+", type=str, metavar="PROMPT", help="""such as 'text red "KAHO"'""")
    reads.add_argument(
        "--adapter", nargs="+", default=[], metavar="FOLDER", help="of adapters or of runs, or ids of the hub"
    )
    reads.add_argument("--base", metavar="MODEL", help="a model of diffusers: its folder, or its id on the hub")
    reads.add_argument("--config", metavar="RECIPE", help="a config or a recipe whose backbone and sampler draw")
    reads.add_argument("--out", default="runs/draw", metavar="FOLDER", help="where to; default: runs/draw")
    reads.add_argument("--count", type=PositiveInt, default=1, help="pictures of each prompt; default: 1")
    reads.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    reads.add_argument("--steps", type=PositiveInt | None, help="of the ODE; default: as the recipe evaluates")
    reads.add_argument("--guidance", type=float | None, help="of all; default: each at its own, as its card says")
    reads.add_argument("--size", type=PositiveInt | None, help="pixels a side; default: the model's own")
    reads.add_argument("--device", metavar="DEVICE", help="cpu, cuda, …; default: a GPU, if there is one")
    return reads
