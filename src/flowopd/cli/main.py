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

from flowopd.cli.beside import let_import

LIGHTNING = ("fit", "validate", "test", "predict")

# The other verbs: each function reads sys.argv itself. Those of ``RUNS`` take the words of a fit.
RUNS = {"plan": "flowopd.cli.run:plan", "check": "flowopd.cli.run:check"}
TOOLS = {
    "data": "flowopd.prompts.data:main",
    "convert": "flowopd.rewards.geneval.convert:main",
    "serve": "flowopd.rewards.remote.serve:main",
    "study": "flowopd.cli.study.command:main",
    "push": "flowopd.cli.push:main",
    "report": "flowopd.cli.report:main",
    "recipes": "flowopd.cli.recipes:list_recipes",
    "init": "flowopd.cli.init:main",
    "draw": "flowopd.cli.draw:main",
    "consolidate": "flowopd.cli.consolidate:main",
}
VERBS = (*LIGHTNING, *RUNS, *TOOLS)

HELP = """usage: flowopd {fit,validate,test,predict,plan,check} --config RECIPE [--config OVERLAY] [--OPTION VALUE]
       flowopd draw PROMPT [PROMPT ...] [--adapter FOLDER ...] [--base MODEL]
       flowopd recipes [WORLD]
       flowopd init RECIPE FOLDER
       flowopd {study,data,convert,serve} [--OPTION VALUE ...]
       flowopd consolidate LORA [LORA ...] --base MODEL --prompts FILE [FILE ...] --out DIR
       flowopd report RUN [RUN ...] [--out FOLDER]
       flowopd push RUN USER/NAME [--dry-run]

Post-train a flow-matching text-to-image model on many tasks at once, by multi-teacher on-policy distillation.

  recipes    list the recipes that come with the package
  init       copy a recipe to edit; or begin a task of one's own: flowopd init --task mine
  fit        train a GRPO teacher, a cold start or a student, and write its adapter
  validate   score a policy on held-out prompts
  test       score a policy beside the base and its teachers: results.md, results.csv and an image grid
  predict    draw held-out prompts to PNG files
  draw       draw prompts of one's own, by the base and by adapters side by side
  plan       say what a fit would take: memory, forwards and TFLOP per update; reads and downloads no weights
  check      check a fit before its long run: a verdict per line
  consolidate many LoRAs into one: each teaches the prompts of its file, no reward is asked
  study      run many of these by one file, for several seeds each: what is done is skipped; a table over all
  data       write a prompt set as JSON lines: geneval, ocr, ocr_paper, pickapic, drawbench, compbench
  convert    turn mmdet's checkpoint of GenEval's detector into a folder that GenEval reads
  push       a finished run as a model of the hub: adapter, pictures, scores, a card
  report     a page of one run, or of several side by side: HTML that stands alone, Markdown and PNGs
  serve      answer for a reward over HTTP: flowopd serve --reward flowopd.tiles.Crispness --port 8080

  flowopd fit --config tiles/opd                                        the main job, on the built-in world
  flowopd fit --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt    go on with a run
  flowopd fit --help                                                    every option
  flowopd fit --model.help flowopd.OPDStudent                           the options of a class
  flowopd --version --verbose                                           versions and devices, for a report of a bug
"""

NEEDS = "needs to be told what to run; give --config FILE, or a recipe by its name: flowopd recipes lists them"

_RUN = "--config RECIPE [--config OVERLAY ...] [--OPTION VALUE ...]"
USAGES = {verb: f"flowopd {verb} {_RUN}" for verb in (*LIGHTNING, *RUNS)}

_CONFIGS = """RECIPE and OVERLAY are files, or names that flowopd recipes lists; later ones change earlier ones, and the
command line changes all: --trainer.max_epochs 100, --model.init_args.sampler.init_args.guidance_scale 1.
--model.help CLASS, --data.help CLASS and --print_config say what there is to change."""

TOLD = {
    "fit": f"""Train what the recipe says: a GRPO teacher, a cold start or a student.

  flowopd fit --config tiles/opd                                the main job of the built-in world
  flowopd fit --config sd35/opd --config sd35/hardware/24gb     on one card of 24 GB
  flowopd fit --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt    go on, bit for bit

A run writes a folder of its own (trainer.default_root_dir; no earlier one is written over): config.yaml, metrics.csv,
checkpoints, images, results.md, report/report.html, and adapter/, for peft, diffusers and flowopd draw.
Before it: flowopd plan says what it takes, flowopd check whether it will run.

{_CONFIGS}""",
    "validate": f"""Score the policy of a recipe on held-out prompts, and nothing beside it.

  flowopd validate --config tiles/evaluate --model.init_args.start RUN/adapter

{_CONFIGS}""",
    "test": f"""Score the policy of a recipe beside the base and its teachers: a table, an image grid, a report.

  flowopd test --config tiles/evaluate --model.init_args.start RUN/adapter
  flowopd test --config tiles/benchmark             many models on the same noise, with intervals; goes on if stopped

{_CONFIGS}""",
    "predict": f"""Draw the held-out prompts of a recipe by its policy, to PNG files; others: flowopd draw.

  flowopd predict --config tiles/evaluate --model.init_args.start RUN/adapter

{_CONFIGS}""",
    "plan": f"""Say what a fit would take: memory of every device, forwards and FLOP of an update and of an evaluation.

  flowopd plan --config sd35/opd --config sd35/hardware/24gb

No weights are read or downloaded, and the devices that are asked for need not be here. On a machine with a GPU the
run's own micro-batches are timed too, on random weights. The words are those of flowopd fit.

{_CONFIGS}""",
    "check": f"""Check a fit before its long run: a verdict per line, and exit code 1 if one says FAIL.

  flowopd check --config sd35/opd --config sd35/hardware/24gb

Prompts, weights, run folder, noise levels, guidance, teachers, the ratio at the first update, rewards. What the run
needs is read and, where it is not here, downloaded; nothing is trained, and no folder is left. The words are those of
flowopd fit.

{_CONFIGS}""",
}


def main() -> None:
    """Entry point of ``flowopd``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "--version":
        _tell_version(verbose="--verbose" in arguments)
    elif arguments[0] in RUNS and {"-h", "--help"} & {*arguments}:
        print(f"usage: {USAGES[arguments[0]]}\n\n{TOLD[arguments[0]]}")
    elif arguments[0] in USAGES and not arguments[1:]:
        _refuse(f"{arguments[0]} {NEEDS}")
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


def _tell_version(verbose: bool) -> None:
    from flowopd import __version__

    print(__version__)
    if verbose:
        print(_function("flowopd.cli.about:about")())


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
    let_import()
    try:
        _function(tool)()
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        from flowopd.cli.sentences import sentence_of

        _refuse(sentence_of(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


def _function(path: str) -> Callable[[], Any]:
    module, _, name = path.partition(":")
    with _leaving_at_once():
        function: Callable[[], Any] = getattr(import_module(module), name)
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
