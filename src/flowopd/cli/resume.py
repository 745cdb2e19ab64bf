"""What was changed since the checkpoint that a run goes on from: it takes effect, and is said; or it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What nothing that is left to do would read, and what would make figures of one run that cannot be compared.
SETTLED = {
    "seed_everything": "it seeded the start",
    "model.start": "the checkpoint holds what became of it",
    "model.lora": "the checkpoint holds an adapter of its own shape",
    "model.strategy": "the checkpoint holds what became of it",
    "model.backbone.path": "the checkpoint's adapter was trained on it",
    "model.backbone.revision": "the checkpoint's adapter was trained on it",
    "data.evaluation_prompts": "the start was scored on the earlier ones",
    "data.evaluation_count": "the start was scored on the earlier ones",
    "trainer.callbacks.DriftMetrics": "the start was measured otherwise",
    "trainer.callbacks.EarlyStopping.patience": "lightning keeps that of the checkpoint",
}
ELSEWHERE = ("config", "ckpt_path", "weights_only", "trainer.default_root_dir")
"""What a run that goes on takes from the checkpoint's place, or needs once."""


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a configuration by name: ``model.optimizer.lr``, ``trainer.callbacks.EMA.decay``.

    >>> settings({"model": {"class_path": "flowopd.OPDStudent", "init_args": {"lora": {"rank": 4}}}})
    {'model': 'OPDStudent', 'model.lora.rank': 4}
    """
    return {name: value for name, value in _leaves(config) if not name.startswith(ELSEWHERE)}


def check_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line that says what was changed and takes effect; empty if nothing was.

    Raises:
        ValueError: naming a setting that cannot be changed, and why.
    """
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    for name in changed:
        reason = next((why for key, why in SETTLED.items() if _within(name, key)), None)
        if reason is None or _has_moved(before.get(name)):
            continue
        raise ValueError(
            f"{name} was {before.get(name)!r} when the checkpoint was made, now {now.get(name)!r}; a run that goes on "
            f"cannot change it ({reason}): give {before.get(name)!r}, or start a new run"
        )
    told = [f"{name} {_short(before.get(name))} → {_short(now.get(name))}" for name in changed]
    return f"changed since the checkpoint, and takes effect: {', '.join(told)}" if told else ""


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, str(value["class_path"]).rpartition(".")[2]
        value = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for title, item in _titled(value):
            yield from _leaves(item, f"{name}.{title}")
    elif isinstance(value, list | tuple):
        yield name, [_plain(item) for item in value]
    else:
        yield name, _plain(value)


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A value that every checkpoint can hold; of one that is of a class of its own (``PositiveInt``), what it says."""
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), str)
    return None if value is None else kind(value)


def _titled(items: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Every item by its class, its own name if it has one, and its number if another is called so before it."""
    seen = Counter[str]()
    for item in items:
        arguments = item.get("init_args") or {} if isinstance(item, Mapping) else {}
        title = str(item.get("class_path", "")).rpartition(".")[2] if isinstance(item, Mapping) else str(item)
        title += f"({arguments['name']})" if arguments.get("name") else ""
        seen[title] += 1
        yield (title if seen[title] == 1 else f"{title}#{seen[title]}"), item


def _within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _has_moved(value: Any) -> bool:  # noqa: ANN401
    """Whether a path of the earlier run leads nowhere here: the machine is another one, or the folder was moved."""
    paths = value if isinstance(value, list) else [value]
    return any(isinstance(path, str) and Path(path).is_absolute() and not Path(path).exists() for path in paths)


def _short(value: Any) -> str:  # noqa: ANN401
    return text if len(text := str(value)) <= 60 else f"{text[:57]}…"
