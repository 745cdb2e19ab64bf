"""Whether a class fits where it is given: which method of a protocol or base class it lacks, or takes otherwise."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, get_type_hints

PACKAGE = "flowopd"


def misfit(given: type, seam: type, annotated: bool = False) -> str | None:
    """What stands between a class and a protocol or base class of ours: a method that it lacks, or takes otherwise.

    Args:
        given: somebody's class.
        seam: what it is to be.
        annotated: its methods have to repeat the annotations, as the parser wants it of a protocol.

    Returns:
        What is found and what was expected, to follow the name of the class; None if nothing stands between them.
    """
    for name, ours in _methods(seam):
        theirs = inspect.getattr_static(given, name, None)
        if theirs is None or getattr(theirs, "__isabstractmethod__", False):
            return f"it has no {name}; expected {_shown(name, ours)}"
        if inspect.isfunction(theirs) and inspect.isfunction(ours) and not _takes(theirs, ours, annotated):
            return f"it has {_shown(name, theirs)}; expected {_shown(name, ours)}"
    return None


def refuse_misfits(config: Mapping[str, Any]) -> None:
    """Raise if a class in a config overrides what it inherits from us so that it cannot be called.

    Raises:
        ValueError: naming the option, the class, and the signature that was expected.
    """
    for place, given in _classes(config, ""):
        if fault := inherited_misfit(given):
            raise ValueError(f"{place}: {given.__module__}.{given.__qualname__} is {fault}")


def inherited_misfit(given: type) -> str | None:
    """What stands between a class and the nearest of its base classes that is ours, or nothing."""
    base = next((base for base in given.__mro__[1:] if _ours(base)), None)
    fault = base and misfit(given, base)
    return f"not a {base.__name__}: {fault}" if base and fault else None


def why_not(given: Any, name: str) -> str:  # noqa: ANN401
    """Why something is not what we call by a name, to follow a sentence that says so; nothing of what is not ours."""
    modules = [module for key, module in sorted(sys.modules.items()) if key.split(".")[0] == PACKAGE]
    kinds = [kind for module in modules if inspect.isclass(kind := vars(module).get(name)) and _ours(kind)]
    if not kinds or not inspect.isclass(given):
        return ""
    seam = kinds[0]
    if getattr(seam, "_is_protocol", False):
        return f": {misfit(given, seam, annotated=True) or 'its methods are called otherwise'}"
    fault = misfit(given, seam)
    return f": it is no subclass of {seam.__module__}.{name}{f', and {fault}' if fault else ''}"


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == PACKAGE


def _classes(value: Any, place: str) -> Iterator[tuple[str, type]]:  # noqa: ANN401
    """Every class of somebody else's that a config names, and where."""
    if isinstance(value, list):
        for item in value:
            yield from _classes(item, place)
    if not isinstance(value, Mapping):
        return
    if isinstance(path := value.get("class_path"), str):
        module, _, name = path.rpartition(".")
        given = getattr(import_module(module), name)
        if inspect.isclass(given) and not _ours(given):
            yield place, given
    for key, inner in value.items():
        yield from _classes(inner, place if key == "init_args" else f"{place}.{key}".removeprefix("."))


def _methods(seam: type) -> Iterator[tuple[str, Any]]:
    """What a protocol or base class says in public, and what it leaves open."""
    for base in reversed(seam.__mro__):
        for name, method in vars(base).items():
            called = inspect.isfunction(method) or getattr(method, "__isabstractmethod__", False)
            if _ours(base) and called and not name.startswith("_"):
                yield name, inspect.getattr_static(seam, name)


def _takes(theirs: Callable[..., Any], ours: Callable[..., Any], annotated: bool) -> bool:
    """Whether a method can be called as ours is, by place and by name."""
    if annotated and _hints(theirs) != _hints(ours):
        return False
    asked = inspect.signature(ours).parameters.values()
    names = [one.name for one in asked if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    signature = inspect.signature(theirs)
    try:
        bound = signature.bind(*names)
        signature.bind(names[0], **dict.fromkeys(names[1:]))
    except TypeError:
        return False
    return all(name == value for name, value in bound.arguments.items() if name in names)


def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(method)
    except NameError:  # of a type that is imported for type checkers alone
        return dict(method.__annotations__)


def _shown(name: str, method: Any) -> str:  # noqa: ANN401
    """A method as one would write it, without the homes of its types."""
    if not inspect.isfunction(method):
        return f"a property {name}"
    said = str(inspect.signature(method)).replace("'", "")
    return name + re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", said)
