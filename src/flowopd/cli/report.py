"""``flowopd report``: what runs made of themselves, on one page."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from flowopd.report import write


def main() -> None:
    """Entry point of ``flowopd report``."""
    told = "Write report.html (one file, needs no network), report.md and PNGs, of one run or of several side by side."
    reads = ArgumentParser(prog="flowopd report", description=told, exit_on_error=False, allow_abbrev=False)
    reads.add_argument("runs", nargs="*", metavar="RUN", help="a run folder: finished, stopped, or still running")
    reads.add_argument("--out", metavar="FOLDER", help="where to; default: RUN/report, or ./report for several")
    words = reads.parse_args(sys.argv[2:])
    print(f"wrote {write([Path(run) for run in words.runs], words.out)}")
