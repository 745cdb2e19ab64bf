"""What ``flowopd draw`` does: finds out with what, draws, and writes the pictures and their sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar as hide_diffusers_bars
from jsonargparse import Namespace
from torch import Tensor
from transformers.utils.logging import disable_progress_bar as hide_transformers_bars

from flowopd.cli.models import Drawing, Found, of_adapter, of_configs, of_model, usual
from flowopd.cli.recipes import located
from flowopd.core.names import refuse_duplicates
from flowopd.core.ranges import within
from flowopd.evaluation.drawing import Hand, draw
from flowopd.evaluation.pictures import contact_sheet, save_png
from flowopd.models import Backbone
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import attach
from flowopd.rollouts import Sampler
from flowopd.training.ranks.folders import Claim, check_place

SHEET = 2.4
"""Inches of a picture on the sheet."""


def draw_words(words: Namespace) -> None:
    """Draw what a command line asks for.

    Raises:
        ValueError: if what it asks for does not go together.
    """
    hide_diffusers_bars()  # of loading; downloads keep theirs
    hide_transformers_bars()
    check_place(Path(words.out))
    adapters = [of_adapter(path) for path in words.adapter]
    backbone, sampler = _chosen(words, adapters).built(words.size)
    hands = _hands(words, backbone, sampler, adapters)
    sampler.eval_steps = words.steps or sampler.eval_steps
    backbone.load(words.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for one in adapters:
        attach(backbone.network, str(hands[one.name].adapter), read_adapter(one.path))
    texts = [text for text in words.prompts for _ in range(words.count)]
    pictures = draw(backbone, sampler, texts, hands, words.seed)
    claim = Claim.fresh(Path(words.out))
    write(pictures, texts, hands, words.seed, claim.folder)
    claim.release()
    said = ", ".join(f"{name} at guidance {hand.guidance_scale:g}" for name, hand in hands.items())
    print(f"drawn in {sampler.eval_steps} steps: {said}\nwritten: {claim.folder / 'sheet.png'} and a PNG for each")


def _chosen(words: Namespace, adapters: Sequence[Found]) -> Drawing:
    """With what to draw: as is asked for, else as the first adapter says that says so, else the built-in world."""
    if words.base is not None and words.config is not None:
        raise ValueError("draw takes --base or --config, not both; a config names its model")
    if words.config is not None:
        return of_configs([located(words.config)])
    if words.base is not None:
        return of_model(words.base)
    return next((said for one in adapters if (said := one.drawing()) is not None), None) or usual()


def _hands(words: Namespace, backbone: Backbone, sampler: Sampler, adapters: Sequence[Found]) -> dict[str, Hand]:
    """The base, and every adapter at its own guidance, or at the base's where nobody says."""
    within(0.0, 100.0, guidance=words.guidance)
    refuse_duplicates("adapter", ["base", *(one.name for one in adapters)])
    base = sampler.guidance_scale if backbone.guidance_scale is None else backbone.guidance_scale
    own = {one.name: one.guidance() for one in adapters}
    scales = {"base": base} | {name: base if scale is None else scale for name, scale in own.items()}
    keys: dict[str, str | None] = {"base": None, **{name: f"adapter_{k}" for k, name in enumerate(own)}}
    if words.guidance is not None:
        scales = dict.fromkeys(scales, words.guidance)
    return {name: Hand(keys[name], scale) for name, scale in scales.items()}


def write(
    pictures: Mapping[str, Tensor], texts: Sequence[str], hands: Mapping[str, Hand], seed: int, folder: Path
) -> None:
    """Write a PNG for each picture, ``pictures.jsonl`` that says what they are, and ``sheet.png``.

    Args:
        pictures: (B, 3, H, W) of each hand.
        texts: B prompts.
        hands: who drew.
        seed: of the noise.
        folder: that is there.
    """
    lines = []
    for name, drawn in pictures.items():
        for row, (picture, text) in enumerate(zip(drawn, texts, strict=True)):
            file = f"{row:02d}_{name}.png"
            save_png(picture, folder / file)
            facts = {"file": file, "prompt": text, "model": name, "guidance": hands[name].guidance_scale, "seed": seed}
            lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
    (folder / "pictures.jsonl").write_text("".join(lines), encoding="utf-8")
    titled = {f"{name}, guidance {hands[name].guidance_scale:g}": drawn for name, drawn in pictures.items()}
    contact_sheet(titled, texts, folder / "sheet.png", SHEET)
