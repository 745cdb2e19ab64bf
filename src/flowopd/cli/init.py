"""``flowopd init``: a recipe to edit, or the beginnings of a task of one's own."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from jsonargparse import ArgumentParser

from flowopd.cli.recipes import PACKAGE, recipe

TAKEN = ("text", "composition")
"""Tasks of the tiles world that stand beside the new one, or watch it."""


TOLD = """Copy a recipe to edit (flowopd recipes lists them); or begin a task of one's own: a reward, prompts, a teacher
and a student, which run on the built-in world in two minutes as they are."""


def main() -> None:
    """Entry point of ``flowopd init``."""
    words = _parser().parse_args(sys.argv[2:])
    if words.task is None and words.recipe is None:
        raise ValueError("init needs a recipe to copy, such as tiles/opd, or --task NAME")
    if words.task is not None and words.folder is not None:
        raise ValueError(f"init takes a recipe or --task, not both; got {words.recipe!r} and --task {words.task}")
    if words.task is not None:
        files = task_files(words.task, Path(words.recipe or words.task))
    else:
        files = recipe_files(words.recipe, words.folder)
    write(files)
    print("wrote " + ", ".join(map(str, files)) + "; next:")
    lines = [line for text in files.values() for line in text.splitlines()]
    print("\n".join(dict.fromkeys(line[2:] for line in lines if line.startswith("#   flowopd "))))


def _parser() -> ArgumentParser:
    reads = ArgumentParser(prog="flowopd init", description=TOLD, exit_on_error=False, allow_abbrev=False)
    reads.add_argument("recipe", nargs="?", metavar="RECIPE", help="such as tiles/opd")
    reads.add_argument("folder", nargs="?", metavar="FOLDER", help="where to; default: a new one of the recipe's name")
    reads.add_argument("--task", metavar="NAME", help="begin a task of that name: flowopd init --task NAME [FOLDER]")
    return reads


def recipe_files(name: str, where: str | None = None) -> dict[Path, str]:
    """A recipe as it would stand in a folder, by default one of its own name, with a run folder of that name."""
    found = recipe(name)
    folder = Path(where or found.path.stem)
    path = folder / found.path.name
    text = found.text.replace(f"configs/{found.name}.yaml", path.as_posix())
    return {path: re.sub(r"(?m)^(  default_root_dir: ).*$", rf"\g<1>runs/{folder.name or found.path.stem}", text)}


def task_files(task: str, folder: Path) -> dict[Path, str]:
    """What a task of one's own begins with.

    Raises:
        ValueError: if no module could have its name, or the tiles world has a task of that name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", task) or keyword.iskeyword(task):
        raise ValueError(f"task is {task!r}; expected a name of small letters, digits and '_', such as mine")
    if task in TAKEN:
        raise ValueError(f"the built-in world has a task {task!r} already; give another name")
    templates = [path for path in sorted((PACKAGE / "cli" / "task").iterdir()) if path.name != "README.md"]
    names = [path.name.replace(".py.txt", ".py").replace("TASK", task) for path in templates]
    texts = [path.read_text(encoding="utf-8").replace("TASK", task) for path in templates]
    filled = [text.replace("FOLDER", folder.as_posix()) for text in texts]
    return {folder / name: text for name, text in zip(names, filled, strict=True)}


def write(files: Mapping[Path, str]) -> None:
    """Write files, none of them over another.

    Raises:
        ValueError: naming one that is there.
    """
    if there := [path for path in files if path.exists()]:
        raise ValueError(f"{str(there[0])!r} is there already; give another folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
