"""The recipes that come with the package: found by name, and listed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flowopd.core.names import perhaps

PACKAGE = Path(__file__).parents[1]


def home() -> Path:
    """The folder of the recipes: of the installed package, or ``configs/`` of the checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "configs"


@dataclass(frozen=True)
class Recipe:
    """A config that comes with the package.

    Args:
        name: ``tiles/opd``; its file is of that name, below ``home()``.
    """

    name: str

    @property
    def path(self) -> Path:
        """The file."""
        return home() / f"{self.name}.yaml"

    @cached_property
    def text(self) -> str:
        """What the file says."""
        return self.path.read_text(encoding="utf-8")

    @property
    def kind(self) -> str:
        """``recipe``, ``study``, or ``overlay``, which is given after a recipe."""
        if re.search(r"^stages:", self.text, re.MULTILINE):
            return "study"
        return "recipe" if self.name.count("/") == 1 else "overlay"

    @property
    def told(self) -> str:
        """The first sentence of the comment at the head of the file."""
        lines = [line.removeprefix("#").strip() for line in self._head() if not line.startswith(("#   ", "# takes: "))]
        return re.split(r"(?<=[\w)])\.(?:\s|$)", " ".join(lines).removeprefix("After opd.yaml: "), maxsplit=1)[0]

    @property
    def takes(self) -> str:
        """Memory and minutes, where the file says them."""
        found = [line.removeprefix("# takes: ") for line in self._head() if line.startswith("# takes: ")]
        return found[0] if found else ""

    def _head(self) -> list[str]:
        lines = self.text.splitlines()
        return lines[: next((k for k, line in enumerate(lines) if not line.startswith("#")), len(lines))]


def recipes(within: str = "") -> list[Recipe]:
    """All of them whose name begins so, by name.

    Raises:
        ValueError: if there is none.
    """
    names = sorted(path.relative_to(home()).with_suffix("").as_posix() for path in home().rglob("*.yaml"))
    found = [Recipe(name) for name in names if name.startswith(within)]
    if not found:
        raise ValueError(f"no recipe's name begins with {within!r}{perhaps(within, names)}; see flowopd recipes")
    return found


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: if there is none.
    """
    if not (found := Recipe(name.removesuffix(".yaml"))).path.is_file():
        names = [one.name for one in recipes()]
        raise ValueError(f"there is no recipe {name!r}{perhaps(name, names)}; flowopd recipes lists them")
    return found


def located(config: str) -> str:
    """The file that a config is: one of that name, or the recipe's; without a checkout ``configs/NAME.yaml`` is it too.

    Raises:
        ValueError: if the word is the name of neither.
    """
    if Path(config).exists() and not Path(config).is_dir():
        return config
    if (path := Recipe(config.removeprefix("configs/").removesuffix(".yaml")).path).is_file():
        return str(path)
    return config if Path(config).suffix else str(recipe(config).path)  # a missing file is told by the parser


def with_files(words: Sequence[str]) -> list[str]:
    """A command line, every recipe in it by its file.

    Raises:
        ValueError: naming a config that is neither a file nor a recipe.
    """
    return [_with_file(word) if named else word for word, named in zip(words, _configs(words), strict=True)]


def configs_among(words: Sequence[str]) -> list[Path]:
    """The files of a command line's configs."""
    return [Path(word.partition("=")[2] or word) for word, named in zip(words, _configs(words), strict=True) if named]


def _configs(words: Sequence[str]) -> list[bool]:
    """Which of the words name a config."""
    flags = ("--config", "-c")
    before = ["", *words[:-1]]
    return [last in flags or word.startswith("--config=") for last, word in zip(before, words, strict=True)]


def _with_file(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
    return f"{flag}{equals}{located(value)}"


def list_recipes() -> None:
    """Entry point of ``flowopd recipes``."""
    from jsonargparse import ArgumentParser

    told = "List the recipes that come with the package, a line each: name, what it does, and what it takes if known."
    reads = ArgumentParser(prog="flowopd recipes", description=told, exit_on_error=False, allow_abbrev=False)
    reads.add_argument("within", nargs="?", default="", metavar="WORLD", help="those of tiles, sd35, … alone")
    found = recipes(reads.parse_args(sys.argv[2:]).within)
    titles = {
        "recipe": "recipes: flowopd fit --config NAME",
        "overlay": "overlays, after a recipe: flowopd fit --config NAME --config OVERLAY",
        "study": "studies: flowopd study --config NAME",
    }
    for kind, title in titles.items():
        if some := [one for one in found if one.kind == kind]:
            print(f"\n{title}")
            _print(some)
    print("\nflowopd init NAME FOLDER copies one to edit.")


def _print(some: Sequence[Recipe]) -> None:
    """A line each, cut to the width of a terminal, whole elsewhere."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    longest = max(len(one.name) for one in some)
    for one in some:
        line = f"  {one.name:<{longest}}  {f'[{one.takes}] ' if one.takes else ''}{one.told}"
        print(line if len(line) <= width else f"{line[: width - 1]}…")
