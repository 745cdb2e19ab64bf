"""A study as a file says it; whatever is wrong with the file is one sentence before anything runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowopd.cli.given import SEEDS, check_files
from flowopd.cli.main import LIGHTNING
from flowopd.cli.recipes import located
from flowopd.core.names import perhaps, refuse_duplicates


@dataclass(frozen=True)
class Stage:
    """One ordinary command, once for every seed.

    Args:
        name: of the stage, and of its row in the table.
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        configs: files, laid over one another.
        overrides: options of the command line by name, which win.
        seeds: ``seed_everything`` of each run.
        folder: its runs are ``<folder>/seed_<n>``.
        rows: models of ``results.csv`` that the table shows; none for the trained one.
        needs: earlier stages whose adapters it uses.
    """

    name: str
    verb: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    seeds: tuple[int, ...]
    folder: Path
    rows: tuple[str, ...]
    needs: tuple[str, ...] = field(default=())

    def words(self, seed: int) -> list[str]:
        """The command line of a run."""
        configs = [word for path in self.configs for word in ("--config", path)]
        overrides = [f"--{name}={_word(value)}" for name, value in self.overrides.items()]
        return [
            self.verb,
            *configs,
            *overrides,
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={self.run(seed)}",
        ]

    def run(self, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"seed_{seed}"

    def seed_for(self, seed: int) -> int:
        """The seed of this stage's run that a run of a later stage uses: its own, or the only one there is."""
        return seed if seed in self.seeds else self.seeds[0]


@dataclass(frozen=True)
class Study:
    """Stages, and the folder of their runs and of their table."""

    folder: Path
    stages: list[Stage]

    def stage(self, name: str) -> Stage:
        """The stage of a name."""
        return next(stage for stage in self.stages if stage.name == name)

    def adapters(self, stage: Stage, seed: int) -> dict[str, Path]:
        """What ``${stage:NAME}`` is in a run, by name."""
        needed = [self.stage(name) for name in stage.needs]
        return {other.name: other.run(other.seed_for(seed)) / "adapter" for other in needed}


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: in one sentence, if the file is no study.
        FileNotFoundError: if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"study {str(path)!r} does not exist")
    given = _checked(_read(path), STUDY, "the study")
    if not given.get("stages"):
        raise ValueError(f"study {str(path)!r} has no stages; give a list of them")
    folder = Path(given.get("folder", f"runs/{path.stem}"))
    stages = [_stage(options, f"stages[{k}]", folder, given) for k, options in enumerate(given["stages"])]
    refuse_duplicates("stage", [stage.name for stage in stages])
    _check_folders(stages)
    _check_needs(stages)
    return Study(folder, stages)


Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what would be."""


def _is_text(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_seeds(value: Any) -> bool:  # noqa: ANN401
    right = isinstance(value, list) and all(type(seed) is int and 0 <= seed <= SEEDS for seed in value)
    return right and len(value) == len(set(value)) > 0


NAME: Check = (
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", value)),
    "a name of letters, digits, '_', '-' and '.'",
)
FILES: Check = (lambda value: _is_text(value) or _are_texts(value), "a file or a list of files")
WORDS: Check = (_are_texts, "a list of models")
NUMBERS: Check = (_are_seeds, f"a list of different whole numbers from 0 to {SEEDS}")
PLACE: Check = (_is_text, "a folder")

COMMON: dict[str, Check] = {"seeds": NUMBERS, "rows": WORDS}
STUDY: dict[str, Check] = {
    "folder": PLACE,
    **COMMON,
    "stages": (lambda value: isinstance(value, list), "a list of stages"),
}
STAGE: dict[str, Check] = {
    "name": NAME,
    "run": (lambda value: value in LIGHTNING, f"one of {', '.join(LIGHTNING)}"),
    "configs": FILES,
    "overrides": (lambda value: isinstance(value, dict) and all(map(_is_text, value)), "a table of options"),
    "folder": PLACE,
    **COMMON,
}
SET_BY_THE_STUDY = {"seed_everything": "seeds", "trainer.default_root_dir": "folder", "config": "configs"}


def _read(path: Path) -> Any:  # noqa: ANN401
    check_files(["--config", str(path)])
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise ValueError(f"study {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _checked(given: Any, known: Mapping[str, Check], where: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; expected a table of {', '.join(known)}")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}{perhaps(key, known)}; it takes: {', '.join(known)}")
        right, expected = known[key]
        if not right(value):
            raise ValueError(f"{where}: {key} is {value!r}; expected {expected}")
    return given


def _stage(given: Any, where: str, folder: Path, study: Mapping[str, Any]) -> Stage:  # noqa: ANN401
    options = _checked(given, STAGE, where)
    for name in ("name", "configs"):
        if name not in options:
            raise ValueError(f"{where} has no {name}; give it")
    name = options["name"]
    overrides = options.get("overrides", {})
    for key in overrides:
        if (instead := SET_BY_THE_STUDY.get(key)) is not None:
            raise ValueError(f"stage {name!r} overrides {key}, which the study sets; give {instead}")
    if options.get("run", "fit") == "fit" and "ckpt_path" in overrides:
        raise ValueError(f"stage {name!r} overrides ckpt_path, by which the study goes on with a fit; leave it out")
    configs = [options["configs"]] if isinstance(options["configs"], str) else options["configs"]
    configs = tuple(map(located, configs))
    if missing := [config for config in configs if not Path(config).is_file()]:
        raise ValueError(f"stage {name!r}: config {missing[0]!r} does not exist")
    return Stage(
        name=name,
        verb=options.get("run", "fit"),
        configs=configs,
        overrides=overrides,
        seeds=tuple(options.get("seeds") or study.get("seeds") or [0]),
        folder=Path(options.get("folder", folder / name)),
        rows=tuple(options.get("rows") or study.get("rows") or ()),
        needs=tuple(dict.fromkeys(_references(configs, overrides))),
    )


def _references(configs: tuple[str, ...], overrides: Mapping[str, Any]) -> Iterator[str]:
    """Names in ``${stage:NAME}``, wherever they stand but in comments."""
    for text in [json.dumps(overrides), *map(_without_comments, configs)]:
        yield from re.findall(r"\$\{stage:\s*([^}\s]*)\s*\}", text)


def _without_comments(config: str) -> str:
    try:
        return OmegaConf.to_yaml(OmegaConf.load(config))
    except Exception:  # what cannot be read is told where the stage is built
        return ""


def _check_folders(stages: list[Stage]) -> None:
    places = {stage.name: os.path.abspath(stage.folder) for stage in stages}
    for (one, here), (other, there) in combinations(places.items(), 2):
        if os.path.commonpath([here, there]) in (here, there):
            raise ValueError(
                f"stages {one!r} and {other!r} write into one folder, {min(here, there)}; give one another"
            )


def _check_needs(stages: list[Stage]) -> None:
    known = {stage.name: stage for stage in stages}
    order = list(known)
    for stage in stages:
        for name in stage.needs:
            if name not in known:
                raise ValueError(
                    f"stage {stage.name!r} uses ${{stage:{name}}}, but there is no such stage{perhaps(name, known)}"
                )
            _check_need(stage, known[name])
    try:
        TopologicalSorter({stage.name: stage.needs for stage in stages}).prepare()
    except CycleError as error:
        raise ValueError(f"stages use one another in a circle: {' ← '.join(error.args[1])}") from None
    for stage in stages:
        if late := [name for name in stage.needs if order.index(name) > order.index(stage.name)]:
            raise ValueError(f"stage {stage.name!r} uses ${{stage:{late[0]}}}, which comes later; put it before")


def _check_need(stage: Stage, used: Stage) -> None:
    if used.verb != "fit":
        raise ValueError(f"stage {stage.name!r} uses ${{stage:{used.name}}}, which is a {used.verb} and has no adapter")
    if len(used.seeds) > 1 and not set(stage.seeds) <= set(used.seeds):
        raise ValueError(
            f"stage {stage.name!r} has seeds {_listed(stage.seeds)}, but {used.name!r}, which it uses, has "
            f"{_listed(used.seeds)}; give both the same, or the latter one alone"
        )


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def _word(value: Any) -> str:  # noqa: ANN401
    return value if isinstance(value, str) else json.dumps(value)
