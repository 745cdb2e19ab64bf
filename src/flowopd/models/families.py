"""Which backbone a model is for, by its name or by what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowopd.models.files import local_folder
from flowopd.models.pipeline import DiffusersBackbone


def family_of(path: str, revision: str | None = None) -> type[DiffusersBackbone]:
    """The backbone of a model: of a known name, nothing is asked of the hub; else its ``model_index.json`` says.

    Args:
        path: a pipeline folder, or a model id of the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is of a family that is not known here.
    """
    known = list(_families(DiffusersBackbone))
    if not Path(path).is_dir():
        named = [family for family in known if path.rpartition("/")[2] in family.drawn_at]
        if named:
            return named[0]
    index = local_folder("model", path, revision, ["model_index.json"]) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"model {path!r} has no model_index.json; expected a pipeline of diffusers")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    found = [family for family in known if family.pipeline_class.__name__ == name]
    if not found:
        pipelines = ", ".join(family.pipeline_class.__name__ for family in known)
        raise ValueError(f"model {path!r} is a {name}; known here are {pipelines}")
    return found[0]


def _families(kind: Any) -> Iterator[type[DiffusersBackbone]]:  # noqa: ANN401 - mypy takes no abstract class
    """Every class of backbone that names its pipeline."""
    for family in kind.__subclasses__():
        if hasattr(family, "pipeline_class"):
            yield family
        yield from _families(family)
