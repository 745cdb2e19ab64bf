"""The GenEval reward: detect, name colours, judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowopd.core.ranges import one_of
from flowopd.prompts.geneval import TAGS
from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes
from flowopd.rewards.clip import L14_NUMBERS, OPENAI_L14, shared_clip
from flowopd.rewards.geneval.colours import ColorNamer
from flowopd.rewards.geneval.detector import META, META_NUMBERS, Detector, read_detector
from flowopd.rewards.geneval.verdicts import (
    Compat,
    Detection,
    Found,
    Scene,
    Verdict,
    correct,
    partial,
    select,
    strict,
    to_color,
)
from flowopd.rewards.model import ModelReward, Precision


class GenEval(ModelReward):
    """Are the objects of the prompt there, as many, in their colours and places? In [0, 1], 1 is right.

    Prompts carry GenEval's metadata: ``tag``, ``include``, ``exclude``. Parts: ``correct`` (the published metric),
    ``strict``, ``partial``, and ``correct`` once more under the prompt's tag; GenEval's overall number is the mean of
    the six tags' means.

    Args:
        detector: an instance Mask2Former of COCO's classes: a model id of the hub, or a folder.
        revision: branch, tag or commit on the hub.
        clip: OpenAI's ViT-L/14, which names colours: a model id of the hub, or a folder in open_clip's layout. Rewards
            that ask for the same one share it.
        clip_revision: branch, tag or commit on the hub.
        verdict: what the score is: ``partial`` to train on, ``correct`` to report.
        compat: terms of ``partial``: each in [0, 1], or as flow_grpo counts (no floor; a wrong position earns 0 and 1).
        batch_size: images per forward.
        dtype: precision of both networks; what follows the detector is float32 in any case.
        offload: keep the weights on the CPU between uses.
    """

    weights: ClassVar = {META: META_NUMBERS, OPENAI_L14: L14_NUMBERS}

    def __init__(
        self,
        detector: str = META,
        revision: str | None = None,
        clip: str = OPENAI_L14,
        clip_revision: str | None = None,
        verdict: Verdict = "partial",
        compat: Compat = "fixed",
        batch_size: int = 8,
        dtype: Precision = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, offload, dtype)
        one_of(Verdict, verdict=verdict)
        one_of(Compat, compat=compat)
        self.detector = detector
        self.revision = revision
        self.clip = clip
        self.clip_revision = clip_revision
        self.verdict = verdict
        self.compat = compat
        self._detector: Detector
        self._namer: ColorNamer

    def read(self) -> None:
        """Read the detector and CLIP.

        Raises:
            FileNotFoundError: if one is not there, saying where to get it.
            ValueError: if one does not hold what it should.
        """
        self._detector = read_detector(self.detector, self.revision, self.torch_dtype)
        self._namer = ColorNamer(shared_clip(self.clip, self.clip_revision, self.dtype))

    def networks(self) -> Iterable[nn.Module]:
        """The detector and CLIP."""
        return self._detector, self._namer.clip

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores and parts, (B,) each.

        Raises:
            ValueError: if a prompt has no metadata of GenEval, or unknown words in it.
        """
        images = as_bytes(images, prompts)
        for prompt in prompts:  # a bad prompt speaks before weights are read
            Scene.of(prompt)
        return super().detail(images, prompts)

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of one batch, images (b, 3, H, W) uint8."""
        scenes = [Scene.of(prompt) for prompt in prompts]
        found = [select(each, scene.tag) for each, scene in zip(self._detector.detect(images), scenes, strict=True)]
        colors = self._colors(images, found, scenes)
        rows = [self._judge(*each, colors) for each in zip(found, scenes, strict=True)]
        parts = {name: torch.tensor([row[name] for row in rows], device=images.device) for name in rows[0]}
        return Scores(parts[self.verdict], parts)

    def _colors(self, images: Tensor, found: Sequence[Found], scenes: Sequence[Scene]) -> dict[int, str]:
        """Colours that verdicts will ask for, by the identity of the detection."""
        pairs = enumerate(zip(found, scenes, strict=True))
        asked = [(row, detection) for row, (each, scene) in pairs for detection in to_color(each, scene)]
        names = self._namer.names(images, asked)
        return {id(detection): name for (_, detection), name in zip(asked, names, strict=True)}

    def _judge(self, found: Found, scene: Scene, colors: dict[int, str]) -> dict[str, float]:
        def color(detection: Detection) -> str:
            return colors[id(detection)]

        right = float(correct(found, scene, color))
        return {
            "correct": right,
            "strict": float(strict(found, scene, color)),
            "partial": partial(found, scene, color, self.compat),
            **{tag: right if tag == scene.tag else float("nan") for tag in TAGS},
        }
