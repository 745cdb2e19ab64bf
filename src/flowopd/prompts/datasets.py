"""Prompts from data sets of the hub, or from folders of the same kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flowopd.prompts.files import NAMES, PromptList, read_prompt
from flowopd.records import Prompt


class PromptDataset(PromptList):
    """A column of a data set of the hub, or of a folder of JSON, CSV or parquet, as the library ``datasets`` reads it.

    The other columns that hold texts, numbers, and lists or tables of them are metadata, which rewards read; pictures,
    sounds, and what is called ``text`` or ``prompt`` beside the column are left out. All is read and checked at once.
    Without ``evaluation_prompts`` of its own, a run keeps a tenth of the texts for evaluation and trains on the others.

    Args:
        name: id of the hub, or a folder.
        column: the one that holds the texts.
        split: which rows, such as ``train`` or ``train[:10000]``.
        task: the task of its prompts.
        subset: the configuration of the data set, where it has several.
        revision: branch, tag or commit on the hub.
        parse: as of ``PromptFile``.
        trigger: as of ``PromptFile``.

    Raises:
        ImportError: without the package ``datasets``, saying how to get it.
        ValueError: if there is no such data set, split or column, no prompt in it, or one that cannot be read; with the
            row.
    """

    def __init__(
        self,
        name: str,
        column: str,
        split: str,
        task: str,
        subset: str | None = None,
        revision: str | None = None,
        parse: Callable[[str], Prompt] | None = None,
        trigger: str = "",
    ) -> None:
        self.name = name
        self.column = column
        self.split = split
        self.task = task
        rows = _rows(name, column, split, subset, revision)
        called = f"split {split!r} of data set {name!r}"
        if not len(rows):
            raise ValueError(f"{called} holds no prompt; choose another split")

        read = (
            read_prompt(partial(_fields, row, column), f"row {number} of {called}", task, parse, trigger)
            for number, row in enumerate(rows)
        )
        super().__init__(list(read), called)


def _fields(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {"text": row[column]} | {key: value for key, value in row.items() if key not in (column, *NAMES)}


def _rows(name: str, column: str, split: str, subset: str | None, revision: str | None) -> Any:  # noqa: ANN401
    """The rows of a data set, with the columns alone that can be metadata."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('PromptDataset reads by the package datasets; pip install "flowopd[datasets]"') from error
    try:
        rows = load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds; all of them mean: not here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data set {name!r} cannot be read, split {split!r}: {first}") from error
    if column not in rows.features:
        raise ValueError(f"data set {name!r} has no column {column!r}; it has {', '.join(map(repr, rows.features))}")
    return rows.select_columns([key for key, kind in rows.features.items() if _is_data(kind)])


def _is_data(kind: Any) -> bool:  # noqa: ANN401
    """Whether a column holds texts, numbers, or lists and tables of them."""
    if isinstance(kind, dict):
        return all(map(_is_data, kind.values()))
    if isinstance(kind, list):
        return all(map(_is_data, kind))
    if inner := getattr(kind, "feature", None):
        return _is_data(inner)
    return getattr(kind, "dtype", "") not in ("binary", "large_binary") and type(kind).__name__ in (
        "Value",
        "ClassLabel",
    )
