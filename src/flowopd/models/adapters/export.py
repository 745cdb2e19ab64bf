"""An adapter as others want it: peft's layout, diffusers' file, and a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

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
    """

    base: str
    made_by: str
    facts: Mapping[str, str] = field(default_factory=dict)
    teachers: Sequence[tuple[str, str, str]] = ()
    guidance_scale: float = 1.0
    pipeline: str | None = "StableDiffusion3Pipeline"
    call: Mapping[str, float | str] = field(default_factory=dict)

    def text(self, adapter: Adapter) -> str:
        """The card in Markdown, with the hub's header."""
        rows = [("base model", self.base), ("made by", self.made_by), ("adapter", _shape(adapter)), *self.facts.items()]
        rows += [(name, f"{kind}, fingerprint {digest}") for name, kind, digest in self.teachers]
        rows += [("fingerprint", adapter.fingerprint()), ("versions", _versions())]
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])
        usage = USAGE.format(base=self.base, pipeline=self.pipeline, diffusers=DIFFUSERS_WEIGHTS, call=self._call())
        text = f"# A LoRA adapter made by flowopd\n\n{table}\n\n{usage if self.pipeline else ''}{self._guidance()}\n"
        return f"---\n{self._header()}\n---\n\n{text}"

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

With peft:

```python
pipe = {pipeline}.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "PATH_OF_THIS_FOLDER").merge_and_unload()
```

or with diffusers alone:

```python
pipe.load_lora_weights("PATH_OF_THIS_FOLDER", weight_name="{diffusers}")
```

```python
pipe("PROMPT", {call}).images[0]
```

"""


def export_adapter(adapter: Adapter, folder: Path, card: ModelCard) -> None:
    """Write an adapter for peft and for diffusers, with its card; all of it, or nothing.

    Raises:
        ValueError: if the disk is full, or the folder cannot be written to.
    """
    with complete_or_nothing(folder) as partial:
        write_peft(adapter, partial, card.hub_base())
        write_diffusers(adapter, partial)
        (partial / "README.md").write_text(card.text(adapter), encoding="utf-8")


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
