"""The command line: Lightning's verbs (``flowopd fit | validate | test | predict``), and a few of our own.

The first help text answers without importing torch.
"""

import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

LIGHTNING = ("fit", "validate", "test", "predict")

# The other verbs: each function reads sys.argv itself. Those of ``RUNS`` take the words of a fit.
RUNS = {"plan": "flowopd.cli.run:plan", "check": "flowopd.cli.run:check"}
TOOLS = {
    "consolidate": "flowopd.cli.consolidate:main",
    "data": "flowopd.prompts.data:main",
    "convert": "flowopd.rewards.geneval.convert:main",
    "serve": "flowopd.rewards.remote.serve:main",
    "study": "flowopd.cli.study.command:main",
    "push": "flowopd.cli.push:main",
    "report": "flowopd.cli.report:main",
}
VERBS = (*LIGHTNING, *RUNS, *TOOLS)

HELP = """usage: flowopd {fit,validate,test,predict,plan,check} --config FILE [--config FILE ...] [--OPTION VALUE ...]
       flowopd {study,data,convert,serve} [--OPTION VALUE ...]
       flowopd consolidate LORA [LORA ...] --base MODEL --prompts FILE [FILE ...] --out DIR
       flowopd report RUN [RUN ...] [--out FOLDER]
       flowopd push RUN USER/NAME [--dry-run]

Post-train a flow-matching text-to-image model on many tasks at once, by multi-teacher on-policy distillation.

  fit        train a GRPO teacher, a cold start or a student, and write its adapter
  validate   score a policy on held-out prompts
  test       score a policy beside the base and its teachers: results.md, results.csv and an image grid
  predict    draw held-out prompts to PNG files
  plan       say what a fit would take: memory, forwards and TFLOP per update; reads and downloads no weights
  check      check a fit before its long run: a verdict per line
  consolidate many LoRAs into one: each teaches the prompts of its file, no reward is asked
  study      run many of these by one file, for several seeds each: what is done is skipped; a table over all
  data       write a prompt set as JSON lines: geneval, ocr, ocr_paper, pickapic, drawbench, compbench
  convert    turn mmdet's checkpoint of GenEval's detector into a folder that GenEval reads
  push       a finished run as a model of the hub: adapter, pictures, scores, a card
  report     a page of one run, or of several side by side: HTML that stands alone, Markdown and PNGs
  serve      answer for a reward over HTTP: flowopd serve --reward flowopd.tiles.Crispness --port 8080

  flowopd fit --config configs/tiles/opd.yaml                           the main job, on the built-in world
  flowopd fit --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt    go on with a run
  flowopd fit --help                                                    every option
  flowopd fit --model.help flowopd.OPDStudent                           the options of a class
  flowopd --version
"""


def main() -> None:
    """Entry point of ``flowopd``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "--version":
        from flowopd import __version__

        print(__version__)
    elif arguments[0] in TOOLS:
        _use(TOOLS[arguments[0]])
    elif arguments[0] in VERBS:
        run = _function(RUNS.get(arguments[0], "flowopd.cli.run:run"))
        with heeding():
            run()
    else:
        from flowopd.core.names import perhaps

        verb = arguments[0][:40]
        _refuse(f"there is no verb {verb!r}{perhaps(verb, VERBS)}; expected one of {', '.join(VERBS)}")


_heard: list[int] = []
"""The signals that asked for an end."""


def heed(signum: int, *_: Any) -> None:
    """Answer Ctrl-C or SIGTERM: end, after whatever a run does when it is stopped."""
    _heard.append(signum)
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def heed_again() -> None:
    """End after all, if a library has made another error of what ended it, as some do that import others late."""
    if _heard:
        heed(_heard.pop())


@contextmanager
def heeding() -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM by an orderly end."""
    _heard.clear()
    before = {signum: signal.signal(signum, heed) for signum in _unanswered()}
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except Exception:
        if _heard:
            raise SystemExit("interrupted" if _heard[-1] == signal.SIGINT else 128 + _heard[-1]) from None
        raise
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def _unanswered() -> list[int]:
    """The signals that would end the process; a child of a background shell ignores Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return [signum for signum, handler in usual.items() if signal.getsignal(signum) is handler]


def _use(tool: str) -> None:
    """Run a tool; what it is given wrongly is one sentence and exit code 2."""
    try:
        _function(tool)()
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        from flowopd.cli.sentences import sentence_of

        _refuse(sentence_of(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


def _function(path: str) -> Callable[[], None]:
    module, _, name = path.partition(":")
    with _leaving_at_once():
        function: Callable[[], None] = getattr(import_module(module), name)
    return function


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """End at a signal on the spot: nothing is begun yet, and an exception could land anywhere in what is imported."""
    before = {signum: signal.signal(signum, _leave) for signum in _unanswered()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def _leave(signum: int, *_: Any) -> None:
    os.write(2, b"interrupted before anything was done\n")
    os._exit(128 + signum)


def _refuse(sentence: str) -> None:
    print(f"flowopd: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
