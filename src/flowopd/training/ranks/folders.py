"""The folder of a run: one process works in it, and nothing of another run is written over."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

CHECKPOINTS = "checkpoints"


def numbered(path: Path) -> Iterator[Path]:
    """``run``, ``run-2``, ``run-3``, …."""
    yield path
    for number in range(2, 10_000):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def check_place(wanted: Path) -> None:
    """Raise unless a folder of that name could be made.

    Raises:
        ValueError: naming what is in the way.
    """
    above = next(path for path in wanted.absolute().parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"run folder {wanted} cannot be made: {above} is a file; give another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {wanted} cannot be made: {above} is not ours to write in; give another")


class Claim:
    """A folder that this process holds until it lets go of it, or ends.

    Args:
        folder: that is there.
        handle: of the lock.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        self._handle: int | None = handle

    def release(self) -> None:
        """Let go of it; once is enough."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    @classmethod
    def fresh(cls, wanted: Path) -> Claim:
        """The wanted folder, or the first of its numbered siblings that nobody has.

        What a fit left that was killed before its first checkpoint is taken again.

        Raises:
            ValueError: if it cannot be made.
        """
        for folder in numbered(wanted):
            try:
                folder.mkdir(parents=True)  # fails if it is there: of two runs that start at once, one gets it
                handle = _lock(folder, needed=False)
            except FileExistsError:
                handle = _lock(folder) if _abandoned(folder) else None
            except OSError as error:
                raise ValueError(f"run folder {folder} cannot be made: {error.strerror}; give another") from error
            if handle is not None:
                return cls(folder, handle)
        raise ValueError(f"run folder {wanted} and all its numbered siblings are taken; give another")

    @classmethod
    def of_run(cls, folder: Path) -> Claim:
        """The folder of a run that goes on.

        Raises:
            ValueError: if another process works in it.
        """
        handle = _lock(folder, needed=False)
        if handle is None:
            raise ValueError(f"another process works in run folder {folder}; wait for its end, or stop it")
        return cls(folder, handle)


def _abandoned(folder: Path) -> bool:
    """Whether a fit has begun there, and nothing of it could be gone on with."""
    begun = folder / CHECKPOINTS
    return begun.is_dir() and not any(begun.glob("*.ckpt")) and not (folder / "adapter").exists()


def _lock(folder: Path, needed: bool = True) -> int | None:
    """A handle on a folder that nobody else holds; where a disk knows no locks, only if none is needed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if needed or isinstance(error, BlockingIOError):
            os.close(handle)
            return None
    return handle
