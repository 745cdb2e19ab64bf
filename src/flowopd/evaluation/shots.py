"""Small pictures of some models on the same prompts and noise, and what each scored; for whoever reads them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from flowopd.evaluation.pictures import to_uint8
from flowopd.rewards.scorer import Column

SIDE = 256
"""Pixels a side at most; larger pictures are made smaller."""


@dataclass(frozen=True)
class Shots:
    """Pictures of M models on B prompts, from the same noise.

    Args:
        iteration: after which they were drawn.
        prompts, tasks: B texts and the names of their tasks.
        pictures: B of every model, of one size.
        scores: by model and reward, B numbers; none where a picture was not to be scored, or scoring failed.
    """

    iteration: int
    prompts: Sequence[str]
    tasks: Sequence[str]
    pictures: Mapping[str, Sequence[Image.Image]]
    scores: Mapping[str, Mapping[str, Sequence[float | None]]]

    def save(self, path: Path) -> None:
        """Write a PNG without margins, a row per model and a column per prompt, and what is known as JSON beside it."""
        width, height = next(iter(self.pictures.values()))[0].size
        sheet = Image.new("RGB", (width * len(self.prompts), height * len(self.pictures)))
        for row, pictures in enumerate(self.pictures.values()):
            for column, picture in enumerate(pictures):
                sheet.paste(picture, (column * width, row * height))
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"iteration": self.iteration, "prompts": list(self.prompts), "tasks": list(self.tasks)}
        facts |= {"models": list(self.pictures), "scores": {name: dict(found) for name, found in self.scores.items()}}
        sheet.save(path)
        path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Shots:
        """What ``save`` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            sheet = Image.open(path).convert("RGB")
            models, prompts = facts["models"], facts["prompts"]
            width, height = sheet.width // len(prompts), sheet.height // len(models)
            pictures = {
                model: [
                    sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
                    for column in range(len(prompts))
                ]
                for row, model in enumerate(models)
            }
            return Shots(facts["iteration"], prompts, facts["tasks"], pictures, facts["scores"])
        except (KeyError, TypeError, ZeroDivisionError, ValueError, OSError) as error:
            raise ValueError(f"{str(path)!r} and its .json are no pictures of a run; draw them anew") from error


def small(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as pictures of at most ``SIDE`` pixels a side."""
    pictures = [Image.fromarray(to_uint8(image)) for image in images]
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE))
    return pictures


def scores_of(columns: Mapping[str, Column]) -> dict[str, list[float | None]]:
    """Scores as numbers, none where a picture was not to be scored or scoring failed."""
    return {
        name: [
            value if asked and math.isfinite(value) else None
            for value, asked in zip(column.values.tolist(), column.asked.tolist(), strict=True)
        ]
        for name, column in columns.items()
    }
