"""A benchmark: prompts, pictures per prompt, and what scores them; the same noise for every model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowopd.core.names import perhaps, refuse_duplicates
from flowopd.core.ranges import at_least, within
from flowopd.core.seeds import seed_of
from flowopd.core.shown import shown
from flowopd.evaluation.drift import colour_entropy, dark_fraction, diversity, edge_density, sharpness
from flowopd.evaluation.ledger import Picture
from flowopd.prompts import PromptSource
from flowopd.prompts.splits import held_out
from flowopd.records import Prompt
from flowopd.rewards import Reward
from flowopd.rewards.base import detailed

PATIENCE = 16  # how many times as many prompts are drawn, at most, to find enough that differ
HOW = {"batch_size", "offload", "workers", "timeout", "retries", "concurrency"}  # of a reward, and of no score
DRIFT = (dark_fraction, edge_density, colour_entropy, sharpness)


class Benchmark:
    """Prompts to draw and rewards to score them by.

    A picture's noise follows from the text of its prompt, its number and the seed, so that every model draws from the
    same, and more prompts change nothing about those that were there.

    Args:
        prompts: where the prompts come from; what no model was trained on.
        rewards: what scores a picture, by name; parts are recorded as ``<name>/<part>``.
        judges: the same, of what no model was trained on: they tell whether a reward was hacked.
        count: how many prompts, all different.
        images_per_prompt: pictures of each.
        steps: of the ODE that draws them.
        group_by: the metadata of a prompt that groups it, such as ``tag``; default: its task.
        macro: rewards whose overall score is the mean of the groups' means; of the others it is that of all pictures.
        best_of_n: rewards that are also shown as the mean over prompts of the best of their pictures.
        seed: of the noise.
        files: what pictures are called in the folder of their model: by the number of their ``prompt``, its ``text``,
            the number of the ``image``, and ``id``, which counts all pictures. T2I-CompBench's scripts read
            ``samples/{text}_{id:06d}.png``.

    Raises:
        ValueError: if a number is out of range, nothing scores, or a name is unknown or given twice.
    """

    def __init__(
        self,
        prompts: PromptSource,
        rewards: dict[str, Reward],
        judges: dict[str, Reward] | None = None,
        count: int = 256,
        images_per_prompt: int = 1,
        steps: int = 40,
        group_by: str | None = None,
        macro: list[str] | None = None,
        best_of_n: list[str] | None = None,
        seed: int = 0,
        files: str = "{prompt:05d}_{image}.png",
    ) -> None:
        at_least(1, count=count, images_per_prompt=images_per_prompt)
        within(1, 1000, steps=steps)
        at_least(0, seed=seed)
        self.source = prompts
        self.rewards = dict(rewards)
        self.judges = dict(judges or {})
        self.count = count
        self.images_per_prompt = images_per_prompt
        self.steps = steps
        self.group_by = group_by
        self.macro = list(macro or [])
        self.best_of_n = list(best_of_n or [])
        self.seed = seed
        self.files = files
        if self.file_of(0, 0, "a/b") == self.file_of(0, 1, "a/b") or self.file_of(0, 0, "a") == self.file_of(1, 0, "a"):
            raise ValueError(
                f"files is {files!r}, which gives two pictures one name; say {{id}}, or {{prompt}} and {{image}}"
            )
        if not self.rewards:
            raise ValueError("a benchmark scores nothing; name a reward in `rewards`")
        refuse_duplicates("score", [*self.rewards, *self.judges])
        self._check_names()

    def _check_names(self) -> None:
        for option in ("macro", "best_of_n"):
            for name in getattr(self, option):
                known = [*self.rewards, *self.judges]
                if name.partition("/")[0] not in known:
                    raise ValueError(f"{option} names {name!r}{perhaps(name, known)}; this benchmark scores {known}")

    def prompts(self) -> list[Prompt]:
        """``count`` prompts of different texts, always the same.

        Raises:
            ValueError: if the source has fewer.
        """
        times = 1
        while True:
            found = {prompt.text: prompt for prompt in held_out(self.source, times * self.count)}
            if len(found) >= self.count:
                return list(found.values())[: self.count]
            times *= 2
            if times > PATIENCE:
                raise ValueError(
                    f"count is {self.count}, but {self.source!r:.120} gives no more than {len(found)} different prompts"
                )

    def seed_of(self, prompt: Prompt, image: int) -> int:
        """Seed of the noise of a picture."""
        return seed_of("benchmark", self.seed, image, prompt.text)

    def noise(self, prompt: Prompt, shape: Sequence[int]) -> Tensor:
        """Starting noise (n, C, H, W) of the pictures of a prompt, drawn on the CPU; diffusers draws the same."""
        seeds = (self.seed_of(prompt, image) for image in range(self.images_per_prompt))
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def file_of(self, prompt: int, image: int, text: str) -> str:
        """What a picture is called.

        Raises:
            ValueError: if ``files`` is no such pattern.
        """
        number = prompt * self.images_per_prompt + image
        try:
            return self.files.format(prompt=prompt, image=image, text=text.replace("/", " "), id=number)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"files is {self.files!r}; it may say {{prompt}}, {{image}}, {{text}} and {{id}}"
            ) from error

    def group_of(self, prompt: Prompt) -> str:
        """The group of a prompt.

        Raises:
            ValueError: if it does not say.
        """
        if self.group_by is None:
            return prompt.task
        if self.group_by not in prompt.metadata:
            raise ValueError(f"prompt {prompt.text!r} says no {self.group_by!r}, by which the benchmark groups")
        return str(prompt.metadata[self.group_by])

    def scored(self, images: Tensor, prompts: Mapping[int, Prompt]) -> list[Picture]:
        """Records of finished pictures (P · n, 3, H, W) in [0, 1], the n of a prompt next to each other.

        Args:
            images: the pictures.
            prompts: P prompts by their numbers.
        """
        rows = [(number, image) for number in prompts for image in range(self.images_per_prompt)]
        scores = self._scores(images, [prompts[number] for number, _ in rows])
        figures = self._figures(images)
        return [
            Picture(
                number,
                image,
                prompts[number].text,
                self.group_of(prompts[number]),
                self.seed_of(prompts[number], image),
                scores[row],
                figures[row],
            )
            for row, (number, image) in enumerate(rows)
        ]

    def _scores(self, images: Tensor, prompts: Sequence[Prompt]) -> list[dict[str, float | None]]:
        rows: list[dict[str, float | None]] = [{} for _ in prompts]
        for name, reward in (self.rewards | self.judges).items():
            with torch.autocast(images.device.type, enabled=False):  # a score is the same in whatever precision we draw
                found = detailed(reward, images, prompts)
            finite = found.value.isfinite().tolist()
            for row, value, scored in zip(rows, found.value.tolist(), finite, strict=True):
                row[name] = value if scored else None
            for part, values in found.parts.items():
                for row, value in zip(rows, values.tolist(), strict=True):
                    row |= {f"{name}/{part}": value} if math.isfinite(value) else {}
        return rows

    def _figures(self, images: Tensor) -> list[dict[str, float]]:
        columns = {function.__name__: function(images).tolist() for function in DRIFT}
        if (n := self.images_per_prompt) > 1:
            each = [float(diversity(pictures)) for pictures in images.split(n)]
            columns["diversity"] = [value for value in each for _ in range(n)]
        return [{name: column[row] for name, column in columns.items()} for row in range(len(images))]

    def identity(self) -> dict[str, Any]:
        """What its pictures and scores follow from, but for the prompts, which records name."""
        scorers = {name: made(reward) for name, reward in (self.rewards | self.judges).items()}
        return {
            "images_per_prompt": self.images_per_prompt,
            "steps": self.steps,
            "seed": self.seed,
            "rewards": scorers,
        }


def made(reward: Reward) -> str:
    """A reward as it would be made again, without what changes no score."""
    names = [name for name in inspect.signature(type(reward)).parameters if name not in HOW and hasattr(reward, name)]
    return f"{type(reward).__name__}({', '.join(f'{name}={shown(getattr(reward, name))}' for name in names)})"
