"""Modules beside a config: imported while it is read, and kept beside the config of its run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def let_import(configs: Sequence[Path] = ()) -> list[Path]:
    """Let what lies beside configs be imported, first of all, and what lies in the working folder, last.

    Returns:
        The folders of the configs.
    """
    folders = list(dict.fromkeys(path.absolute().parent for path in configs))
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path += [str(folder) for folder in (Path.cwd(),) if str(folder) not in sys.path]
    return folders


def keep_modules(folders: Sequence[Path], run: Path) -> None:
    """Copy the modules that were imported from folders into a run's, beside its config: with it alone it goes on."""
    for source, name in _imported(folders):
        if not (kept := run / name).exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, kept)


def _imported(folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Files of modules that Python found in one of the folders, and their places there."""
    for title, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        place = Path(*title.split("."))
        for name in (place.with_suffix(".py"), place / "__init__.py"):
            if any(folder / name == file for folder in folders):
                yield file, name
