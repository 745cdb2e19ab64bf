"""What a config, the name of a model, or the folder of an adapter says of how to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from jsonargparse import ArgumentParser
from omegaconf import DictConfig, OmegaConf

from flowopd.cli.recipes import recipe, recipes
from flowopd.models import Backbone
from flowopd.models.families import family_of
from flowopd.models.files import local_file
from flowopd.rollouts import Sampler
from flowopd.tiles import asset

STEPS = 28
"""Of a model that no recipe is of."""


@dataclass(frozen=True)
class Drawing:
    """A backbone and a sampler, as a config names them."""

    backbone: Mapping[str, Any]
    sampler: Mapping[str, Any]

    def built(self, size: int | None = None) -> tuple[Backbone, Sampler]:
        """Both as objects, for pictures of ``size`` pixels a side; no weights are read."""
        options = dict(self.backbone.get("init_args") or {}) | ({} if size is None else {"resolution": size})
        reads = ArgumentParser(exit_on_error=False)
        reads.add_argument("--backbone", type=Backbone)
        reads.add_argument("--sampler", type=Sampler)
        given = {"backbone": {**self.backbone, "init_args": options}, "sampler": self.sampler}
        made = reads.instantiate_classes(reads.parse_object(given))
        return made.backbone, made.sampler.on(made.backbone)


def of_configs(paths: Sequence[str | Path]) -> Drawing:
    """What configs, laid over one another, draw with.

    Raises:
        ValueError: if they name no backbone and no sampler.
    """
    options = _options(paths)
    missing = [name for name in ("backbone", "sampler") if name not in options]
    if missing:
        raise ValueError(f"config {str(paths[0])!r} names no {missing[0]} of a model; give a recipe of a policy")
    backbone, sampler = (OmegaConf.to_container(options[name], resolve=True) for name in ("backbone", "sampler"))
    return Drawing(backbone, sampler)  # type: ignore[arg-type]


def _options(paths: Sequence[str | Path]) -> DictConfig:
    """What the model of a config is built with."""
    OmegaConf.register_resolver("tiles", lambda name: str(asset(name)), replace=True)
    merged = OmegaConf.merge(*map(OmegaConf.load, paths))
    found = OmegaConf.select(merged, "model.init_args")
    return found if isinstance(found, DictConfig) else OmegaConf.create()


def of_model(base: str) -> Drawing:
    """A model by its folder or id: as the recipes for it draw, or as its family does.

    Raises:
        FileNotFoundError: if it is neither a folder nor a model of the hub.
        ValueError: if it is of a family that is not known here.
    """
    for one in (one for one in recipes() if one.kind == "recipe" and one.name.endswith("/opd")):
        known = of_configs([one.path])
        if _same_model(known.backbone["init_args"]["path"], base):
            options = {**known.backbone["init_args"], "path": base}
            return Drawing({**known.backbone, "init_args": options}, known.sampler)
    family = family_of(base)
    path = f"{family.__module__}.{family.__qualname__}"
    sampler = {"class_path": "flowopd.Sampler", "init_args": {"num_steps": STEPS}}
    return Drawing({"class_path": path, "init_args": {"path": base}}, sampler)


def _same_model(known: str, base: str) -> bool:
    """Whether the two name one model; a folder may be called as the model of the hub that it holds."""
    if Path(known).is_dir():
        return Path(base).is_dir() and Path(known).samefile(base)
    return Path(known).name == Path(base).name


@dataclass(frozen=True)
class Found:
    """An adapter, and what is written beside it.

    Args:
        name: how to call it.
        path: of the adapter.
        config: of the run that made it, if it is there.
        card: the header of its model card.
    """

    name: str
    path: str
    config: Path | None
    card: Mapping[str, Any]

    def drawing(self) -> Drawing | None:
        """With what it draws, if it says so: as its run did, or with the model of its card."""
        if self.config is not None:
            return of_configs([self.config])
        base = self.card.get("base_model")
        return of_model(base) if isinstance(base, str) else None

    def guidance(self) -> float | None:
        """At which it was trained, and is to be drawn: its card's, or its run's."""
        if isinstance(said := self.card.get("guidance_scale"), int | float):
            return float(said)
        if self.config is None:
            return None
        return float(OmegaConf.select(_options([self.config]), "sampler.init_args.guidance_scale", default=1.0))


def of_adapter(path: str) -> Found:
    """An adapter by its folder, by the folder of the run that made it, or by its id on the hub."""
    folder = Path(path)
    if (folder / "adapter").is_dir() and not (folder / "adapter_config.json").is_file():
        folder = folder / "adapter"
    named = folder.absolute()
    name = named.parent.name if named.name == "adapter" else named.stem
    beside = (folder / "config.yaml", folder.parent / "config.yaml")
    config = next((file for file in beside if folder.exists() and file.is_file()), None)
    return Found(name, str(folder) if folder.exists() else path, config, _card(str(folder)))


def _card(path: str) -> Mapping[str, Any]:
    with suppress(OSError):  # it may have none
        return metadata_load(local_file("adapter", path, "README.md", None)) or {}
    return {}


def usual() -> Drawing:
    """The built-in world."""
    return of_configs([recipe("tiles/opd").path])
