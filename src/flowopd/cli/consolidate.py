"""``flowopd consolidate``: many LoRAs into one, by a recipe that it writes and an ordinary fit that runs it."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowopd.cli.main import heeding
from flowopd.cli.words import WordParser

HELP = """Make one LoRA of many. Each is a teacher for the prompts of its own file, with its own trigger words
and its own scale; no reward is asked. The student starts from their merge. At the end there are, in
DIR: a sheet of the base, every LoRA, the merge and the student on the same prompts and noise
(images/models.png), a table of the distances to every LoRA (results.md: fixed_kl, nats per latent
dimension, lower is nearer), and the LoRA for ComfyUI and diffusers
(adapter/pytorch_lora_weights.safetensors)."""

EXAMPLES = """What a fit takes may be added, and comes last: --trainer.max_epochs 100, --config more.yaml.

  flowopd consolidate ink.safetensors user/toy --base stabilityai/stable-diffusion-3.5-medium \\
      --prompts ink.txt toy.txt --triggers "ink drawing," "sks toy" --scales 0.8 1 --out runs/both
  flowopd consolidate ... --plan                        what it would take; nothing is read
  flowopd consolidate ... --print_config > both.yaml    the recipe, to edit and to run by flowopd fit"""

OF_A_FIT = re.compile(
    r"--(config|ckpt_path|push_to|seed_everything|checkpoint_every|updates_per_iteration|[a-z_]+\..+?)(=.*)?$",
    re.DOTALL,
)
"""Words that are passed on."""


def main() -> None:
    """Entry point of ``flowopd consolidate``."""
    own, of_a_fit = parted(sys.argv[2:])
    words = _parser().parse_args(own)
    recipe = Recipe.asked(words).text()
    if words.print_config:
        print(recipe, end="")
        return
    from flowopd.cli.run import PlanCLI, run

    with tempfile.TemporaryDirectory(prefix="flowopd-") as folder, heeding():
        file = Path(folder, "consolidate.yaml")
        file.write_text(recipe, encoding="utf-8")
        sys.argv = [sys.argv[0], "plan" if words.plan else "fit", "--config", str(file), *of_a_fit]
        if words.plan:
            run(PlanCLI)
        else:
            run()


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those of a fit, each of which takes one value.

    >>> parted(["a", "--trainer.max_epochs", "5", "b", "--base=m", "--config=c.yaml"])
    (['a', 'b', '--base=m'], ['--trainer.max_epochs', '5', '--config=c.yaml'])
    """
    own, others, rest = list[str](), list[str](), iter(words)
    for word in rest:
        found = OF_A_FIT.match(word)
        (others if found else own).append(word)
        if found and not found[2]:
            others += [value for value in [next(rest, None)] if value is not None]
    return own, others


def _parser() -> WordParser:
    reads = WordParser(
        prog="flowopd consolidate",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    reads.add_argument(
        "loras", nargs="+", metavar="LORA", help="a folder, a .safetensors file, or org/model[/file] of the hub"
    )
    reads.add_argument("--base", required=True, metavar="MODEL", help="a pipeline folder, a model of the hub, or tiles")
    reads.add_argument(
        "--prompts", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl of each; or one, with triggers"
    )
    reads.add_argument("--out", required=True, metavar="DIR", help="the run folder")
    reads.add_argument("--triggers", nargs="+", default=[""], metavar="WORDS", help="put before prompts that lack them")
    reads.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], metavar="S", help="strength of each; default: 1"
    )
    reads.add_argument(
        "--guidance", nargs="+", type=float, metavar="G", help="of each; default: what the base is drawn at"
    )
    reads.add_argument(
        "--rank", type=int, metavar="R", help="of the student, which decides its memory; default: the sum of theirs"
    )
    reads.add_argument("--resolution", type=int, metavar="PIXELS", help="of the pictures; default: 512")
    reads.add_argument("--updates", type=int, default=300, metavar="N", help="default: 300")
    reads.add_argument("--plan", action="store_true", help="say what it would take: memory, forwards, TFLOP")
    reads.add_argument("--print_config", action="store_true", help="print the recipe, and run nothing")
    return reads


@dataclass(frozen=True)
class Lora:
    """One of many.

    Args:
        task: what it is called.
        source: where it is, and how strong it is used.
        prompts: what its prompts are read by.
        guidance: at which it is asked.
    """

    task: str
    source: dict[str, Any]
    prompts: dict[str, Any]
    guidance: float

    @property
    def teacher(self) -> dict[str, Any]:
        """The arguments of its ``LoRATeacher``."""
        return {**self.source, "guidance_scale": self.guidance}


@dataclass(frozen=True)
class Base:
    """What they are LoRAs of.

    Args:
        kind: name of its class of backbone.
        options: the arguments of that.
        drawn_at: guidance of its model card, where it is known.
        tiles: whether it is the built-in world, whose grid and pace are its own.
    """

    kind: str
    options: dict[str, Any]
    drawn_at: float | None
    tiles: bool = False

    @staticmethod
    def asked(path: str, resolution: int | None) -> Base:
        """What a path, a model of the hub, or ``tiles`` means.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is of no known family.
        """
        if path == "tiles":
            options = {"path": "${tiles:base}", "dtype": "float32", "max_sequence_length": 0}
            return Base("SD3Backbone", options, 1.0, tiles=True)
        from flowopd.models.families import family_of

        family = family_of(path)
        options = {"path": path, "resolution": resolution or 512, "activation_checkpointing": True}
        return Base(family.__name__, options, family(path).guidance_scale)

    def guidance(self) -> float:
        """At which a teacher is asked, if nobody says.

        Raises:
            ValueError: if it is not known.
        """
        if self.drawn_at is None:
            raise ValueError(f"it is not known at which guidance {self.options['path']!r} is drawn; give --guidance")
        return self.drawn_at


@dataclass(frozen=True)
class Recipe:
    """What is consolidated, and how.

    Args:
        loras: all of them.
        base: what they are LoRAs of.
        out: the run folder.
        updates: optimiser steps.
        rank: of the student; ``None``: the sum of their ranks.
    """

    loras: Sequence[Lora]
    base: Base
    out: str
    updates: int = 300
    rank: int | None = None

    @staticmethod
    def asked(words: Namespace) -> Recipe:
        """What the command line asks for.

        Raises:
            FileNotFoundError: if the base is not there.
            ValueError: if words are too few or too many, or the base is of no known family.
        """
        from flowopd.core.ranges import at_least  # not before --help

        at_least(1, updates=words.updates, rank=words.rank)
        count = len(words.loras)
        if len(words.prompts) == 1 < count and len(set(words.triggers)) < count:
            raise ValueError("one file of prompts for several LoRAs needs --triggers, different ones for each")
        base = Base.asked(words.base, words.resolution)
        names = task_names(words.loras)
        sources = map(_source, words.loras, _each("scales", words.scales, count))
        triggers = _each("triggers", words.triggers, count)
        prompts = map(_prompts, _each("prompts", words.prompts, count), names, triggers)
        guidance = _each("guidance", words.guidance or [base.guidance()], count)
        loras = [Lora(*facts) for facts in zip(names, sources, prompts, guidance, strict=True)]
        return Recipe(loras, base, words.out, words.updates, words.rank)

    def text(self) -> str:
        """The recipe as YAML."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        reads = Environment(
            loader=PackageLoader("flowopd.cli", "."), undefined=StrictUndefined, keep_trailing_newline=True
        )
        reads.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)  # JSON is YAML
        count = len(self.loras)
        return reads.get_template("consolidate.yaml.jinja").render(
            vars(self),
            count=count,
            per_lora=12 if self.base.tiles else 8,
            every=max(self.updates // 6, 1),
            pictures=max(8 // count, 1),
        )


def task_names(words: Sequence[str]) -> list[str]:
    """Short names of LoRAs, all different.

    >>> task_names(["loras/My Ink.safetensors", "org/toy", "runs/pets/adapter", "other/toy"])
    ['My_Ink', 'toy', 'pets', 'toy_4']
    """
    names = list[str]()
    for number, word in enumerate(words, 1):
        parts = [part.removesuffix(".safetensors") for part in Path(word.partition("@")[0]).parts]
        telling = [part for part in parts if part not in UNTELLING] or ["lora"]
        name = re.sub(r"[^\w-]+", "_", telling[-1]).strip("_") or "lora"
        names.append(f"{name}_{number}" if name in names else name)
    return names


UNTELLING = ("adapter", "adapter_model", "pytorch_lora_weights", "/", ".", "..")
"""What says nothing of a LoRA at the end of its path."""


def _source(word: str, scale: float) -> dict[str, Any]:
    """Where an adapter is: a path of this disk, or ``org/model[/file][@revision]``."""
    strength = {} if scale == 1 else {"scale": scale}
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?", word)
    if found is None or Path(word).exists() or word.startswith("."):
        return {"path": word, **strength}
    parts = dict(zip(("path", "subfolder", "revision"), found.groups(), strict=True))
    return {name: part for name, part in parts.items() if part} | strength


def _prompts(file: str, task: str, trigger: str) -> dict[str, str]:
    return {"path": file, "task": task} | ({"trigger": trigger} if trigger else {})


def _each(name: str, values: Sequence[Any], count: int) -> list[Any]:
    """One value for each LoRA; one that is given alone is everybody's.

    Raises:
        ValueError: if there are more or fewer.
    """
    if len(values) not in (1, count):
        raise ValueError(f"--{name} has {len(values)} values for {count} LoRAs; give one for each, or one for all")
    return list(values) * (count if len(values) == 1 else 1)
