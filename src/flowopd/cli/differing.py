"""What of a configuration differs from the defaults of the classes that it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from importlib import import_module
from typing import Any

from lightning import Trainer

from flowopd.cli.resume import settings

RUN: Mapping[str, Any] = {"seed_everything": 0, "checkpoint_every": 10, "trainer": {}, "model": None, "data": None}
TRAINER: Mapping[str, Any] = {"num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}


def differing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, as ``settings`` calls them, that are not those of the code.

    >>> differing({"model": {"class_path": "flowopd.models.LoRASpec", "init_args": {"rank": 3, "alpha": 64}}})
    {'model': 'LoRASpec', 'model.rank': 3}
    """
    trainer = _changed(config.get("trainer") or {}, {**_defaults(Trainer), **TRAINER})
    return settings(_changed({**config, "trainer": trainer}, RUN))


def _without_defaults(value: Any) -> Any:  # noqa: ANN401
    """A value with what its classes would have taken anyway left out, all the way down."""
    if isinstance(value, Mapping) and "class_path" in value:
        known = _defaults(_found(str(value["class_path"])))
        return {"class_path": value["class_path"], "init_args": _changed(value.get("init_args") or {}, known)}
    if isinstance(value, Mapping):
        return {key: _without_defaults(part) for key, part in value.items()}
    return [_without_defaults(part) for part in value] if isinstance(value, list | tuple) else value


def _changed(arguments: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    asked = {name: value for name, value in arguments.items() if _plain(value) != _plain(known.get(name))}
    return {name: _without_defaults(value) for name, value in asked.items()}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.value if isinstance(value, Enum) else value


def _found(path: str) -> Callable[..., Any] | None:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Any] | None = getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found


def _defaults(owner: Callable[..., Any] | None) -> dict[str, Any]:
    """Defaults of a class, those of its bases that it passes on to included, or of a function."""
    makers = [vars(base).get("__init__") for base in reversed(owner.__mro__)] if inspect.isclass(owner) else [owner]
    known: dict[str, Any] = {}
    for maker in filter(callable, makers):
        parameters = inspect.signature(maker).parameters.values()
        known |= {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return known
