"""What the parser and the libraries say, as one sentence.

jsonargparse answers with a tree: keys and classes on the way to a fault, and at every fork all that a value could have
been. Whoever made the slip meant the alternative that reads furthest; ``EXPECTED`` and ``PHRASES`` say it in our words.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import flowopd
from flowopd.cli.seams import inherited_misfit, why_not
from flowopd.core.names import perhaps

PACKAGE = str(Path(flowopd.__file__).parent)

LONGEST = 600
"""Characters of a sentence; what somebody gave may be longer than all that can be said of it."""


def meant(error: BaseException | None) -> BaseException | None:
    """The error, or one that caused it, that our own code or the constructor of an argument raised on purpose."""
    while error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename.startswith(PACKAGE) or last.name == "__init__":
            return error
        error = error.__cause__
    return None


def sentence_of(error: BaseException) -> str:
    """Where, what, and what was perhaps meant."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{str(error.filename)!r}: {error.strerror}"
    text = re.sub(r"^\w+ raised while resolving interpolation: |\n +(?:full_key|object_type)[:=].*", "", text)
    if re.search(r"Parser key \"|Problem with given class_path|raised|Union subtypes", text):
        text = _told(_furthest(list(_leaves(text))))
    else:
        text = _told([Leaf("", "", " ".join(text.split()))])
    return _tidy(text)


@dataclass(frozen=True)
class Leaf:
    """One alternative: the option that it is about, the class that takes it, the parser's phrase, what was given."""

    place: str
    owner: str
    phrase: str
    depth: int = 0
    got: str | None = None


NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Subclass types expect one of|"
    r"a class path \(str\)|a dict (?:with|without) |full_key: |object_type=|Expected a <class 'NoneType'>|"
    r"Subclasses are disabled for"
)
GIVEN = re.compile(r"(?:Not of type \w+: (?=\S+ does not conform)|Expected a dot import path string: )(\S+)")
CALLABLE = re.compile(r"Type \S*Callable.* expects a function or a callable class: ")


def _leaves(text: str) -> Iterator[Leaf]:
    """The alternatives of a message; what stands on the way to them is told by its indentation."""
    above: list[tuple[int, str, str]] = []
    waiting: list[Leaf] = []
    for line in filter(str.strip, CALLABLE.sub("", text).splitlines()):
        phrase = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        above = [entry for entry in above if entry[0] < indent]
        if found := re.match(r'Parser key "([^"]+)":\s*|Problem with given class_path \'([^\']+)\':\s*', phrase):
            above.append((indent, found[1] or "", found[2] or ""))
            phrase = phrase[found.end() :]
        place = ".".join(key for _, key, _ in above if key)
        if phrase.startswith("Given value:"):
            given = phrase.removeprefix("Given value:").strip()
            waiting = [_with(leaf, given) if leaf.place == place else leaf for leaf in waiting]
        elif phrase and not NOISE.match(phrase):
            owner = above[-1][2] if above else ""  # of an option, where no further key stands between
            phrase, *got = re.split(r"\. Got value: ?", phrase)
            got += GIVEN.findall(phrase)
            waiting.append(Leaf(place, owner, phrase, len(above), got[0] if got else None))
    yield from waiting


def _with(leaf: Leaf, given: str) -> Leaf:
    return leaf if leaf.got is not None else replace(leaf, got=given)


def _furthest(leaves: list[Leaf]) -> list[Leaf]:
    """The alternatives that read furthest, each said once."""
    deepest = max((leaf.depth for leaf in leaves), default=0)
    first = next((leaf.place for leaf in leaves if leaf.depth == deepest), "")
    return [leaf for leaf in leaves if leaf.depth == deepest and leaf.place == first]


# ------------------------------------------------------------------------------------------------------------- in words

NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table",
    "PositiveInt": "a whole number of at least 1",
    "PositiveFloat": "a number above 0",
}
EXPECTED: dict[str, tuple[str, str]] = {  # how a phrase begins that says what the parser would have taken
    "type": (r"Expected a <class '(?:\w+\.)*(\w+)'>", ""),
    "choice": (r"Expected a typing\.Literal\[(.*?)\]$", "one of {}"),
    "class": (r"Not a valid subclass of (\w+)", "a {} by its class_path"),
    "protocol": (r"Does not implement protocol (\w+)", "a {} by its class_path"),
    "restricted type": (r"Not of type (\w+)", ""),
    "import path": (r"Expected (?:a dot|an) import path", "a class_path"),
    "file": (r"Expected a path but .* either not accessible or invalid", "a path"),
}


def _told(leaves: list[Leaf]) -> str:
    """A sentence of the first alternative that has a fault of its own, else of all that would have been right."""
    own = next((leaf for leaf in leaves if not _kind(leaf.phrase)), None)
    if own is not None:
        return (f"{own.place}: " if own.place else "") + _explained(own)
    if not leaves:
        return "the command cannot be read"
    kinds = dict.fromkeys(str(_kind(leaf.phrase)) for leaf in leaves)
    if len(kinds) > 1:
        kinds.pop("a path", None)  # of a file that holds the value
    if "a number" in kinds:
        kinds.pop("a whole number", None)
    got = next((leaf.got for leaf in leaves if leaf.got is not None), None)
    found = " is not understood" if got is None or "Namespace(" in got else f" is {_cut(got, 60) or 'empty'}"
    return f"{leaves[0].place}{found}; expected {' or '.join(kinds)}"


def _kind(phrase: str) -> str | None:
    for pattern, words in EXPECTED.values():
        if found := re.match(pattern, phrase):
            return _a(words.format(*found.groups())) if words else NAMES.get(found[1], _a(f"a {found[1]}"))
    return None


def _a(words: str) -> str:
    return re.sub(r"\ba (?=[AEIOU])", "an ", words)


def _explained(leaf: Leaf) -> str:
    """The fault of a leaf, with the names that would have been right."""
    for pattern, say in PHRASES.values():
        if found := re.search(pattern, leaf.phrase):
            return say(leaf, found)
    return leaf.phrase


def _no_option_of_class(leaf: Leaf, found: re.Match[str]) -> str:
    name = found[1].partition(".")[0]
    if difflib.get_close_matches(name, ["init_args"], cutoff=0.8):
        return f"there is no {name!r} (did you mean 'init_args'?)"
    given = re.match(r"(?:\{'|Namespace\()class_path(?:': |=)'([\w.]+)'", leaf.got or "")
    if not (owner := leaf.owner or (given[1] if given else "")):
        return f"there is no option {name!r} here"
    if not inspect.isclass(_import(owner)):
        return f"{owner} is no class"
    options = ArgumentParser(exit_on_error=False).add_class_arguments(_import(owner))  # its parents' too
    return f"{owner} has no option {name!r}{perhaps(name, options)}; it takes: {', '.join(options)}"


def _no_such_name(leaf: Leaf, found: re.Match[str]) -> str:
    module = import_module(found[1])
    return f"{found[1]} has no {found[2]!r}{perhaps(found[2], getattr(module, '__all__', dir(module)))}"


def _no_option(leaf: Leaf, found: re.Match[str]) -> str:
    from lightning import Trainer

    options = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    options += ["model", "data", "ckpt_path", "checkpoint_every", "updates_per_iteration", "seed_everything", "config"]
    return f"there is no option {found[1]!r}{perhaps(found[1], options)}; see flowopd {sys.argv[1]} --help"


def _missing(leaf: Leaf, found: re.Match[str]) -> str:
    names = [name.rpartition(".")[2] for name in found[1].split(", ")]
    if found[1].startswith(("fit.", "validate.", "test.", "predict.")):
        return (
            f"nothing says what {' and '.join(sorted(names, reverse=True))} the run has; give --config FILE, "
            "or a recipe by its name: flowopd recipes lists them"
        )
    if leaf.place:
        return f"{leaf.owner or 'it'} needs {', '.join(names)}"
    return f"the command needs {', '.join(f'--{name}' for name in names)}"


def _not_a(leaf: Leaf, found: re.Match[str]) -> str:
    return _a(f"{found[1]} is not a {found[2]}") + why_not(_import(found[1]), found[2])


def _not_made(leaf: Leaf, found: re.Match[str]) -> str:
    if fault := inherited_misfit(_import(found[1])):
        return _a(f"{found[1]} is {fault}")
    return f"{found[1]} is {found[2]}; name a class that implements it"


Say = Callable[[Leaf, re.Match[str]], str]
PHRASES: dict[str, tuple[str, Say]] = {  # a new parser may say it otherwise: tests/test_sentences.py meets every one
    "no gpu": (
        r"^No supported gpu backend found!$",
        lambda *_: "trainer.accelerator is gpu, but no GPU is found here; run where there is one, or give cpu",
    ),
    "option of a class": (r"^Option '([\w.-]+)' is not accepted", _no_option_of_class),
    "option of the command": (r"(?:unrecognized arguments:|does not accept option) '?(?:--)?([\w.-]+).*", _no_option),
    "missing": (r"the following arguments are required: (.*)", _missing),
    "name in a module": (r"module '([\w.]+)' has no attribute '(\w+)'", _no_such_name),
    "module": (
        r"^No module named '([\w.]+)'",
        lambda _, found: f"there is no module {found[1]!r}{perhaps(found[1], ['flowopd', 'torch', 'lightning'])}",
    ),
    "class_path of another type": (
        r"^argument of type '\w+' is not (?:iterable|a container)|^unhashable type: '\w+'|^cannot use '\w+' as a",
        lambda *_: "its class_path is not the name of a class",
    ),
    "init_args of another type": (
        r"^'\w+' object has no attribute 'keys'",
        lambda *_: "its init_args are no table of options",
    ),
    "foreign class": (
        r"^Import path ([\w.]+) does not (?:implement protocol|correspond to a subclass of) (\w+)",
        _not_a,
    ),
    "foreign callable": (r"^Expected '([\w.]+)' to be a subclass of <class '(?:\w+\.)*(\w+)'>", _not_a),
    "abstract class": (
        r"^Expected an instantiatable class, but ([\w.]+) is (abstract|a protocol)",
        _not_made,
    ),
    "config of another type": (
        r"^Unexpected config: (.*)",
        lambda _, found: f"the config holds {_cut(found[1], 60)}; expected a table of options",
    ),
    "interpolation": (
        r"^(?:no viable alternative at|extraneous) input .*",
        lambda _, found: f"an interpolation ${{…}} in the config cannot be read: {found[0]}",
    ),
    "key of another type": (
        r"^Incompatible key type '(\w+)'",
        lambda *_: "a key of the config is empty; expected a name",
    ),
}


def _tidy(text: str) -> str:
    """Without what only a machine can read, and not without end."""
    text = text.replace('in "<unicode string>", ', "at ")
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"<(?:\w+\.)*(\w+)(?: object)? at 0x[0-9a-f]+>", r"\1", text)
    return _cut(" ".join(text.split()), LONGEST)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _import(path: str) -> Any:  # noqa: ANN401
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
