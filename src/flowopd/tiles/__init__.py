"""The built-in world: pictures of 4 × 4 tiles, their language, exact rewards, and a small base model.

Names load on first use, so that looking up an asset costs nothing.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["BASE", "Composition", "Crispness", "Legibility", "Text", "TilesPrompts", "asset", "parse", "render"]

_HOME_OF = {
    "Composition": "flowopd.tiles.rewards",
    "Crispness": "flowopd.tiles.rewards",
    "Legibility": "flowopd.tiles.judges",
    "Text": "flowopd.tiles.rewards",
    "TilesPrompts": "flowopd.tiles.world",
    "parse": "flowopd.tiles.world",
    "render": "flowopd.tiles.world",
}


def asset(name: str) -> Path:
    """Path of something shipped with the tiles world, such as ``base``; it works from an installed wheel too.

    Raises:
        FileNotFoundError: nothing of that name is shipped; the sentence lists what is.
    """
    home = Path(__file__).parent / "assets"
    if not (home / name).exists():
        shipped = ", ".join(sorted(path.name for path in home.glob("*")))
        raise FileNotFoundError(f"the tiles world ships no {name!r}; it ships: {shipped}")
    return home / name


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "BASE":
        return asset("base")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'flowopd.tiles' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
