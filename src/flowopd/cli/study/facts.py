"""What a run depends on: its resolved configuration, and the contents of every file that this names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from typing_extensions import override

from flowopd.cli.run import STAGES, FlowCLI, run
from flowopd.cli.study.file import Stage, Study
from flowopd.preflight.check import Subject, prompts_answer, recipe_fits
from flowopd.training import FlowPolicy, RolloutDataModule

Facts = dict[str, str]
"""Digests by what they are of: the configuration, or a path."""

CONFIGURATION = "its configuration"


def built(stage: Stage) -> dict[str, Any]:
    """The resolved configuration of a stage that was built and fits together; no weights are read.

    Raises:
        SystemExit: after a sentence, if it cannot be built.
    """
    found: list[dict[str, Any]] = []

    class Built(FlowCLI):
        refusal = f"flowopd: error: stage {stage.name!r}"

        @override
        def _set_seed(self) -> None:
            """Nothing is drawn here."""

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            found.append(self.config[subcommand].as_dict())
            if (
                subcommand == "fit"
                and isinstance(self.model, FlowPolicy)
                and isinstance(self.datamodule, RolloutDataModule)
            ):
                self.trainer.strategy.connect(self.model)
                self.model.trainer = self.datamodule.trainer = self.trainer
                for check in (recipe_fits, prompts_answer):
                    check(Subject(self.model, self.datamodule, self.trainer))

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, level = sys.argv, logger.level
    sys.argv = ["flowopd", *stage.words(stage.seeds[0])]
    os.environ[STAGES] = json.dumps({name: f"stage:{name}" for name in stage.needs})
    logger.setLevel(logging.WARNING)  # which devices there are is told by the runs
    try:
        run(Built)
    finally:
        sys.argv = before
        del os.environ[STAGES]
        logger.setLevel(level)
    return found[0]


def facts_of(study: Study, stage: Stage, seed: int, config: Mapping[str, Any]) -> Facts:
    """What a run depends on, now."""
    settings = {name: value for name, value in config.items() if name not in ("config", "seed_everything")}
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name != "default_root_dir"}
    text = json.dumps([stage.verb, seed, settings | {"trainer": trainer}], sort_keys=True, default=str)
    inputs = dict.fromkeys(path for path in _texts(settings) if _is_input(path, stage.run(seed)))
    read = [*map(Path, inputs), *study.adapters(stage, seed).values()]
    return {CONFIGURATION: _digest(text.encode()), **{str(path): _contents(path) for path in read}}


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key != "default_root_dir"]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str | Path):
        yield str(value)


def _is_input(path: str, run: Path) -> bool:
    """Whether there is such a file or folder; one that the run itself writes into is none."""
    return os.path.exists(path) and not run.resolve().is_relative_to(Path(path).resolve())


def _contents(path: Path) -> str:
    """A digest of a file, or of all files of a folder and their names."""
    if not path.exists():
        return "missing"
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    parts = [f"{one.relative_to(path)} {_file(one, one.stat().st_size, one.stat().st_mtime_ns)}" for one in files]
    return _digest("\n".join(parts).encode())


@cache
def _file(path: Path, size: int, changed: int) -> str:
    """A digest of a file, read once for each state of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
