"""Checkpoints as they are named on the command line."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from flowopd.training.ranks.folders import CHECKPOINTS

KEYS = {"state_dict", "loops", "global_step", "pytorch-lightning_version"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, mapped from the disk.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one of a run.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    content: Any = None
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # whatever torch finds in it, it is none of ours
            content = None
    if not isinstance(content, dict) or not content.keys() >= KEYS or not isinstance(content["state_dict"], dict):
        raise ValueError(f"checkpoint {str(path)!r} is not one of lightning; expected <run>/checkpoints/last.ckpt")
    return content


def folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, wherever the command is given."""
    home = checkpoint.absolute().parent
    run = home.parent if home.name == CHECKPOINTS else home
    return run if checkpoint.is_absolute() else Path(os.path.relpath(run))
