"""Checkpoints as they are named on the command line."""

from __future__ import annotations

import os
from pathlib import Path

from flowopd.training.ranks.folders import CHECKPOINTS


def folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, wherever the command is given."""
    home = checkpoint.absolute().parent
    run = home.parent if home.name == CHECKPOINTS else home
    return run if checkpoint.is_absolute() else Path(os.path.relpath(run))
