"""An adapter as others want it: peft's layout, diffusers' file, and a model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCardData

from flowopd import __version__
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, complete_or_nothing, write_peft
from flowopd.models.adapters.lora import Adapter

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "lightning")


@dataclass(frozen=True)
class ModelCard:
    """How an adapter was made.

    Args:
        base: the frozen model: id of the hub, or a folder.
        made_by: name of the module's class.
        facts: what else there is to say, in rows: objective, start, steps, seed.
        teachers: name, kind and fingerprint of every teacher.
        guidance_scale: at which the student was trained, and is to be drawn.
        pipeline: name of the diffusers pipeline that draws with the base, if there is one.
        call: what that guidance is called there, and its number.
        drawing: what else the pipeline is called with to draw as here, by name.
        dtype: the precision of the base.
        absent: parts of the pipeline that are left out.
    """

    base: str
    made_by: str
    facts: Mapping[str, str] = field(default_factory=dict)
    teachers: Sequence[tuple[str, str, str]] = ()
    guidance_scale: float = 1.0
    pipeline: str | None = "StableDiffusion3Pipeline"
    call: Mapping[str, float | str] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    absent: Sequence[str] = ()

    def text(self, adapter: Adapter, where: str = ".") -> str:
        """The card in Markdown, with the hub's header.

        Args:
            adapter: what it is of.
            where: the adapter's folder, or its model of the hub.
        """
        rows = [("base model", self.base), ("made by", self.made_by), ("adapter", _shape(adapter)), *self.facts.items()]
        rows += [(name, f"{kind}, fingerprint {digest}") for name, kind, digest in self.teachers]
        rows += [("fingerprint", adapter.fingerprint()), ("versions", _versions())]
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])
        usage = self._usage(where) if self.pipeline else ""
        text = f"# A LoRA adapter made by flowopd\n\n{table}\n\n{usage}{self._guidance()}\n"
        return f"---\n{self._header()}\n---\n\n{text}"

    def _usage(self, where: str) -> str:
        """How to draw with it, as it stands."""
        arguments = [self._call(), *(f"{name}={value!r}" for name, value in self.drawing.items())]
        parts = [json.dumps(self.base), *(f"{part}=None" for part in self.absent), f"dtype=torch.{self.dtype}"]
        return USAGE.format(
            pipeline=self.pipeline,
            where=json.dumps(where),
            parts=", ".join(parts),
            file=DIFFUSERS_WEIGHTS,
            arguments=", ".join(arguments),
        )

    def _call(self) -> str:
        """Guidance as an argument of the pipeline."""
        call = self.call or {"guidance_scale": self.guidance_scale}
        return ", ".join(
            f"{name}={float(value) if isinstance(value, int) else value!r}" for name, value in call.items()
        )

    def _guidance(self) -> str:
        """How to draw, in one sentence."""
        argument = f"`{self._call()}`"
        if self.guidance_scale == 1:
            return f"Draw without guidance ({argument}): that is how it was trained."
        if self.guidance_scale > 1:
            return f"Draw with guidance {self.guidance_scale:g} ({argument}): that is how it was trained."
        return f"It was trained at {argument}; diffusers draws without guidance at 1 and below."

    def _header(self) -> str:
        tags = ["flowopd", "lora", "flow-matching", "diffusers"]
        return ModelCardData(
            library_name="peft",
            base_model=self.hub_base(),
            pipeline_tag="text-to-image",
            tags=tags,
            guidance_scale=self.guidance_scale,
        ).to_yaml()

    def hub_base(self) -> str | None:
        """The frozen model's id, if it is one of the hub."""
        return self.base if self.base.count("/") == 1 and not Path(self.base).is_dir() else None


USAGE = """## Use

```python
import torch
from diffusers import {pipeline}

adapter = {where}
pipe = {pipeline}.from_pretrained({parts})
pipe.load_lora_weights(adapter, weight_name="{file}")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe("PROMPT", {arguments}).images[0].save("picture.png")
```

With peft instead: `pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, adapter).merge_and_unload()`.
In ComfyUI: `{file}`, put into `models/loras`, at strength 1.

"""
"""What ``flowopd push`` finds again: the line of the adapter, and PROMPT."""


def export_adapter(adapter: Adapter, folder: Path, card: ModelCard) -> None:
    """Write an adapter for peft and for diffusers, with its card; all of it, or nothing.

    Raises:
        ValueError: if the disk is full, or the folder cannot be written to.
    """
    with complete_or_nothing(folder) as partial:
        write_peft(adapter, partial, card.hub_base())
        write_diffusers(adapter, partial)
        (partial / "README.md").write_text(card.text(adapter, str(folder)), encoding="utf-8")


def write_diffusers(adapter: Adapter, folder: Path) -> None:
    """Write what ``pipe.load_lora_weights`` reads, at scale 1: ComfyUI knows no metadata, diffusers no ``.alpha``."""
    plain = adapter.folded()
    StableDiffusion3Pipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers={key: value.detach().cpu().contiguous() for key, value in plain.tensors.items()},
        transformer_lora_adapter_metadata=plain.config().to_dict(),
    )


def _shape(adapter: Adapter) -> str:
    parts = adapter.parts.values()
    size = sum(part.a.numel() + part.b.numel() for part in parts)
    ranks, alphas = _span(part.rank for part in parts), _span(part.scale * part.rank for part in parts)
    return f"rank {ranks}, alpha {alphas} (folded into B), {len(parts)} modules, {size:,} parameters"


def _span(numbers: Iterable[float]) -> str:
    low, *_, high = 2 * sorted(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _versions() -> str:
    return ", ".join([f"flowopd {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
