"""What the parser and the libraries say, as one sentence."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import Trainer

import flowopd
from flowopd.core.names import perhaps

PACKAGE = str(Path(flowopd.__file__).parent)


def meant(error: BaseException | None) -> BaseException | None:
    """The error, or one that caused it, that our own code or the constructor of an argument raised on purpose."""
    while error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename.startswith(PACKAGE) or last.name == "__init__":
            return error
        error = error.__cause__
    return None


def sentence_of(error: BaseException) -> str:
    """The parser's many lines without the alternatives that nobody meant: where, what, and what was perhaps meant."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "full_key:", "object_type=")
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    text = re.split(r"\n[\s-]*(?:Expected a <class 'NoneType'>|Not a valid subclass of)", text)[0]
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(noise))
    keys, classes = r'Parser key "([^"]+)": ', r"Problem with given class_path '([^']+)': "
    place, owners = ".".join(re.findall(keys, text)), re.findall(classes, text)
    fault = re.sub(classes, "", re.sub(keys, "", text)).removeprefix("- ")
    return (f"{place}: " if place else "") + _explained(fault, owners[-1] if owners else "")


def _explained(fault: str, owner: str) -> str:
    """A fault of the parser, with the names that would have been right."""
    if fault == "No supported gpu backend found!":
        return "trainer.accelerator is gpu, but no GPU is found here; run where there is one, or give cpu"
    if found := re.fullmatch(r"Option '(\w+)' is not accepted", fault):
        options = ArgumentParser(exit_on_error=False).add_class_arguments(_import(owner))  # its parents' too
        return f"{owner} has no option {found[1]!r}{perhaps(found[1], options)}; it takes: {', '.join(options)}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", fault):
        module = import_module(found[1])
        return f"{found[1]} has no {found[2]!r}{perhaps(found[2], getattr(module, '__all__', dir(module)))}"
    if found := re.search(r"(?:unrecognized arguments:|does not accept option) '?(?:--)?([\w.]+).*", fault):
        options = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
        options += ["model", "data", "ckpt_path", "checkpoint_every", "updates_per_iteration", "seed_everything"]
        return f"there is no option {found[1]!r}{perhaps(found[1], options)}; see flowopd {sys.argv[1]} --help"
    return fault


def _import(path: str) -> Any:  # noqa: ANN401
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
