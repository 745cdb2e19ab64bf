"""Scores that another run has measured: of models that nobody trains, on the same prompts, noise and rewards."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Remembered:
    """A folder of scores, a JSON file for every model and evaluation, by all that the scores follow from.

    What was measured comes back to the bit. Where a score is no number, nothing is kept.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, facts: Mapping[str, Any]) -> dict[str, float] | None:
        """Scores of the same, if they are there."""
        try:
            content = json.loads(self._file(facts).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # measured anew
            return None
        return dict(content["scores"]) if content.get("facts") == _plain(facts) else None

    def put(self, facts: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Keep scores, unless one of them is no number."""
        if not all(map(math.isfinite, scores.values())):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(facts)
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps({"facts": _plain(facts), "scores": dict(scores)}, indent=1), encoding="utf-8")
        partial.replace(file)

    def _file(self, facts: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(facts), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _plain(facts: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """As they come back from a file."""
    return json.loads(json.dumps(facts))
