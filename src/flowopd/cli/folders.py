"""Where a run keeps what it makes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path


def keep_aside(file: Path) -> None:
    """Move an earlier file of a run that goes on out of the way."""
    if file.exists():
        file.rename(next(path for path in numbered(file) if not path.exists()))


def numbered(path: Path) -> Iterator[Path]:
    """``run``, ``run-2``, ``run-3``, …."""
    yield path
    for number in range(2, 10_000):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is not one of lightning.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint {str(checkpoint)!r} does not exist")
    if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} is not one of lightning; expected <run>/checkpoints/last.ckpt"
        )
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
