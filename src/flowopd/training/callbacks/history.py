"""When, where and with what a run was begun, each time."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flowopd import __version__
from flowopd.models.adapters.export import LIBRARIES
from flowopd.training.callbacks.around import run_folder

HISTORY = "history.jsonl"


class History(Callback):
    """Writes ``history.jsonl``: a line when a run begins (verb, command, settings, versions, git), a line when it ends.

    Args:
        verb: ``fit``, ``test``, ….
        settings: those that differ from their defaults.
    """

    def __init__(self, verb: str, settings: Mapping[str, Any]) -> None:
        self.verb = verb
        self.settings = dict(settings)
        self._path: Path | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # there was nothing to train

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self._path is not None or not trainer.is_global_zero:
            return
        self._path = run_folder(trainer) / HISTORY
        device, ranks = trainer.strategy.root_device, trainer.world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._write(
            event="begin",
            verb=self.verb,
            iteration=trainer.current_epoch,
            model=getattr(trainer.lightning_module, "name", ""),
            command=shlex.join(["flowopd", *sys.argv[1:]]),
            device=f"{ranks} x {name}, {trainer.precision}",
            versions=versions(),
            git=git_state(),
            settings=self.settings,
        )

    def _end(self, trainer: Trainer) -> None:
        if self._path is not None:
            self._write(event="end", iteration=trainer.current_epoch)
        self._path = None

    def _write(self, **facts: Any) -> None:
        assert self._path is not None
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


def versions() -> dict[str, str]:
    """Of Python, this package and what it stands on."""
    here = {"python": platform.python_version(), "flowopd": __version__}
    return here | {name: version(name) for name in LIBRARIES}


def git_state() -> str | None:
    """The commit of the package's sources, or of the working folder; none where neither is under git."""
    for folder in (Path(__file__).parent, Path.cwd()):
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        if commit:
            changed = len(_git(folder, "status", "--porcelain", "--untracked-files=no").splitlines())
            return f"{commit}, {changed} files changed" if changed else commit
    return None


def _git(folder: Path, *words: str) -> str:
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *words], cwd=folder, env=quiet, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
