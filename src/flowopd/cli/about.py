"""What to say of an installation in a report of a bug."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants

from flowopd.cli.recipes import home
from flowopd.training.callbacks.history import git_state, versions

OPTIONAL = ("torchvision", "torchmetrics", "jsonargparse", "open_clip_torch", "rapidocr", "onnxruntime", "litserve")


def about() -> str:
    """Versions, devices, caches and git, a line each; no tokens, and no names of people or machines but paths."""
    return "\n".join(f"{name:<16}{said}" for name, said in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield from versions().items()
    yield from ((name, found) for name in OPTIONAL if (found := _version(name)) is not None)
    yield "system", f"{platform.platform()}, {platform.machine()}"
    yield "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "cuda", f"of torch {torch.version.cuda or 'none'}, devices here: {torch.cuda.device_count()}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 1e9:.0f} GB"
    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    there = "" if Path(constants.HF_HUB_CACHE).is_dir() else ", not there yet"
    yield "hub cache", f"{constants.HF_HUB_CACHE}{there}{offline}"
    yield "recipes", str(home())
    yield "git", git_state() or "none"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
