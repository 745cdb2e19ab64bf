"""What was given is looked at before anything is built: files, settings that are null, numbers of the trainer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning import Trainer
from omegaconf import OmegaConf

from flowopd.core.ranges import at_least, finite, within

SEEDS = 2**32 - 1
HIGHEST_RATE = 1000.0


def check_files(words: Sequence[str]) -> None:
    """Raise unless every config is a file of text whose keys stand there once; the parser would take the last.

    Raises:
        ValueError: naming the file.
    """
    for word, following in zip(words, [*words[1:], ""], strict=True):
        path = Path(following if word == "--config" else word.removeprefix("--config="))
        if not word.startswith("--config") or not path.is_file():
            continue  # what is missing is told by the parser
        try:
            OmegaConf.load(path)
        except UnicodeDecodeError:
            raise ValueError(f"config {str(path)!r} is not a text in UTF-8; save it as one") from None
        except Exception as error:  # what cannot be parsed is told by the parser
            if found := re.search(r"found duplicate key (.+)", str(error)):
                raise ValueError(f"config {str(path)!r} has {found[1]!r} twice in one table; keep one") from None


def check_given(config: Mapping[str, Any]) -> None:
    """Raise unless the numbers of the trainer and the seed are in range, and null stands only where it means something.

    Raises:
        ValueError: naming the option.
    """
    seed, trainer = config.get("seed_everything"), dict(config.get("trainer") or {})
    if not isinstance(seed, bool):
        within(0, SEEDS, seed_everything=seed)
    numbers = _numbers(config, "optimizer")
    within(0.0, HIGHEST_RATE, **{"model.optimizer.lr": numbers.get("model.optimizer.lr")})
    finite(**numbers, **_numbers(config, "scheduler"))
    for minimum, names in TRAINER:
        at_least(minimum, **{f"trainer.{name}": trainer.get(name) for name in names})
    for place, default in [*_nulls(trainer, Trainer, "trainer"), *_inside(config, "")]:
        raise ValueError(f"{place} is null, which means nothing there; leave it out for {default!r}")


TRAINER: Sequence[tuple[float, tuple[str, ...]]] = (
    (0.0, ("gradient_clip_val",)),
    (0, ("log_every_n_steps", "reload_dataloaders_every_n_epochs", "min_epochs", "min_steps")),
    (1, ("num_nodes", "accumulate_grad_batches", "check_val_every_n_epoch")),
)


def _numbers(config: Any, part: str) -> dict[str, float]:  # noqa: ANN401
    """Numbers that the optimiser or the scheduler is given, by option; what else they may be is theirs to say."""
    for key in ("model", "init_args", part, "init_args"):
        config = config.get(key) if isinstance(config, Mapping) else None
    given = config.items() if isinstance(config, Mapping) else ()
    return {f"model.{part}.{name}": value for name, value in given if type(value) in (int, float)}


def _inside(value: Any, place: str, kind: Any = None) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Nulls of every class somewhere in a config: of those that are named, and of records, which need no name."""
    if isinstance(value, list):
        for item in value:
            yield from _inside(item, place)
    if not isinstance(value, Mapping):
        return
    if isinstance(path := value.get("class_path"), str):
        module, _, name = path.rpartition(".")
        yield from _inside(value.get("init_args") or {}, place, getattr(import_module(module), name))
        return
    if kind is not None:
        yield from _nulls(value, kind, place)
    for key, inner in value.items():
        yield from _inside(inner, f"{place}.{key}".removeprefix("."), _record(kind, key))


def _nulls(given: Mapping[str, Any], kind: Any, place: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Options of a class that are null, though it knows no null, and their defaults."""
    takes = _takes(kind)
    for name, value in given.items():
        if value is None and name in takes and not _may_be_null(takes[name]):
            yield f"{place}.{name}", takes[name].default


def _takes(kind: Any) -> dict[str, inspect.Parameter]:  # noqa: ANN401
    """What a class takes, and its parents."""
    takes: dict[str, inspect.Parameter] = {}
    for base in reversed(inspect.getmro(kind) if inspect.isclass(kind) else ()):
        if base is not object and "__init__" in vars(base):
            takes |= inspect.signature(vars(base)["__init__"]).parameters
    return takes


def _may_be_null(option: inspect.Parameter) -> bool:
    said = str(option.annotation)
    return option.default in (None, option.empty) or any(word in said for word in ("None", "Optional", "Any", "empty"))


def _record(kind: Any, name: str) -> Any:  # noqa: ANN401
    """The dataclass that an option of a class takes, or nothing."""
    if kind is None or name not in _takes(kind):
        return None
    for base in inspect.getmro(kind):
        hints = get_type_hints(vars(base)["__init__"]) if "__init__" in vars(base) and base is not object else {}
        if name in hints:
            records = [one for one in (hints[name], *get_args(hints[name])) if is_dataclass(one)]
            return records[0] if records else None
    return None


@contextmanager
def enums_told() -> Iterator[None]:
    """Say which option is an enum by default, where the parser cannot write it down.

    Raises:
        ValueError: naming the enum, and the word to give.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(one := error.args[-1] if error.args else None, Enum):
            raise
        kind = type(one).__name__
        word = one.value
        raise ValueError(f"{kind.lower()} is {word} by default, which no file holds; give it: {word}") from None
