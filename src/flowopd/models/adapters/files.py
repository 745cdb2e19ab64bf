"""Adapters on disk: one door in, whatever wrote the file; one way out, at equal strength for whoever reads it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowopd.core.ranges import within
from flowopd.models.adapters.config import check_module, plain_config, scale
from flowopd.models.adapters.layouts import PEFT, find_factors
from flowopd.models.adapters.lora import Adapter, Factors
from flowopd.models.files import local_folder, refuse_corrupt

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
NAMES = (CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS)
SUFFIX = ".safetensors"
FOLDED = "flowopd_folded"  # in a file's header: the power of two by which B was multiplied, by module


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter is: in a layout of peft, diffusers, kohya or ComfyUI.

    Args:
        path: a folder, a ``.safetensors`` file, or a model id of the hub.
        subfolder: folder, or ``.safetensors`` file, inside it.
        revision: branch, tag or commit on the hub.
        scale: how strong it is used, as the strength of a LoRA in ComfyUI; 1 is as it was saved.
    """

    path: str
    subfolder: str | None = None
    revision: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        within(-100.0, 100.0, scale=self.scale)

    def __str__(self) -> str:
        inside = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.path}{inside}" + (f"@{self.revision}" if self.revision else "")

    def adapter(self) -> Adapter:
        """Read it, as ``read_adapter``, at its scale."""
        return read_adapter(self.path, self.subfolder, self.revision).scaled(self.scale)


def read_adapter(path: str, subfolder: str | None = None, revision: str | None = None) -> Adapter:
    """Read an adapter from a folder, a file or the hub, as a plain LoRA.

    Raises:
        FileNotFoundError: if there is no such folder, file or model, or a file is missing in it.
        ValueError: if it cannot be read, or is not exactly a plain LoRA; saying what it is.
    """
    source = AdapterSource(path, subfolder, revision)
    file = _weights(source)
    refuse_corrupt(file)
    with safe_open(file, "pt") as opened:
        header, tensors = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    try:
        config = _config(file, header)
        return _plain(find_factors(tensors), config, _folded(header))
    except ValueError as error:
        raise ValueError(f"adapter {str(source)!r} {error}") from error


def _weights(source: AdapterSource) -> Path:
    """The file with the tensors."""
    inside = (source.subfolder or "").strip("/")
    if Path(source.path).is_file() or source.path.endswith(SUFFIX):
        file = Path(source.path, inside)
    elif inside.endswith(SUFFIX):
        file = local_folder("adapter", source.path, source.revision, [inside]) / inside
    else:
        wanted = [f"{inside}/{name}".strip("/") for name in NAMES]
        file = _in_folder(local_folder("adapter", source.path, source.revision, wanted) / inside)
    if not file.is_file():
        raise FileNotFoundError(f"adapter file {str(file)!r} does not exist")
    if file.suffix != SUFFIX:
        raise ValueError(f"adapter file {str(file)!r} is not a {SUFFIX} file; others may run code when read")
    if file.name == WEIGHTS and not (file.parent / CONFIG).is_file():
        raise FileNotFoundError(f"adapter folder {file.parent} has no {CONFIG}, which says how strong it is")
    return file


def _in_folder(folder: Path) -> Path:
    """The file with the tensors: peft's, or diffusers' where peft's is not."""
    here = {file.name for file in folder.glob("*")}
    if WEIGHTS in here:
        return folder / WEIGHTS
    if CONFIG in here:
        how = ", with safe_serialization=True" if "adapter_model.bin" in here else ""
        raise FileNotFoundError(f"adapter folder {folder} has no {WEIGHTS}; expected a LoRA saved in peft layout{how}")
    if DIFFUSERS_WEIGHTS in here:
        return folder / DIFFUSERS_WEIGHTS
    raise FileNotFoundError(
        f"adapter folder {folder} has no {CONFIG}; expected a LoRA of peft, or {DIFFUSERS_WEIGHTS}{_elsewhere(folder)}"
    )


def _elsewhere(folder: Path) -> str:
    """What there is instead, as a hint."""
    if files := sorted(file.name for file in folder.glob(f"*{SUFFIX}")):
        return f"; to read a single file, name it: {' or '.join(map(repr, files[:4]))}"
    found = {file.parent.relative_to(folder).as_posix() for name in NAMES for file in folder.glob(f"*/**/{name}")}
    return f"; there is one in subfolder {' or '.join(map(repr, sorted(found)[:4]))}" if found else ""


def _config(file: Path, header: Mapping[str, str]) -> LoraConfig | None:
    """What the file's config says: peft's beside it, or diffusers' in its header; ``None`` if it has none."""
    if file.name == WEIGHTS:
        return plain_config(_object((file.parent / CONFIG).read_bytes(), CONFIG))
    if LORA_ADAPTER_METADATA_KEY not in header:
        return None
    content = _object(header[LORA_ADAPTER_METADATA_KEY], f"its header's {LORA_ADAPTER_METADATA_KEY}")
    ours = {key.removeprefix("transformer."): value for key, value in content.items() if key.startswith("transformer.")}
    return plain_config(ours) if ours else None


def _object(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"has no readable {name} ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"has a {type(content).__name__} for {name}; expected an object of JSON")
    return content


def _plain(found: Mapping[str, Any], config: LoraConfig | None, folded: Mapping[str, int]) -> Adapter:
    parts = {}
    for module, (a, b, alpha) in found.items():
        _check_factors(module, a, b)
        if config is None:
            strength = 1.0 if alpha is None else alpha / len(a)  # the rule of diffusers and of ComfyUI
        elif alpha is None:
            check_module(config, module, len(a))
            strength = scale(config, module, len(a))
        else:
            raise ValueError(f"says its strength twice, in a config and in {module}.alpha; expected one of them")
        power = 2.0 ** folded.get(module, 0)
        parts[module] = Factors(a.float(), b.float() / power, strength * power)
    return Adapter(parts, (config,) if config is not None else ())


def _check_factors(module: str, a: Tensor, b: Tensor) -> None:
    for letter, factor in (("A", a), ("B", b)):
        if not factor.is_floating_point():
            raise ValueError(f"has {factor.dtype} numbers in factor {letter} of {module}; expected floating point")
        if not bool(factor.float().isfinite().all()):
            raise ValueError(f"has a NaN or an infinity in factor {letter} of {module}; its training diverged")
    matrices = a.dim() in (2, 4) and b.dim() == a.dim() and b.shape[2:].numel() == 1
    if not matrices or not len(a) or len(a) != b.shape[1]:
        raise ValueError(f"has factors of shape {tuple(a.shape)} and {tuple(b.shape)} in {module}; expected one rank")


# -------------------------------------------------------------------------------------------------------------- writing


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in peft layout; the old one, if any, stays until the new one is complete.

    Raises:
        ValueError: if the disk is full, or the folder cannot be written to.
    """
    with complete_or_nothing(folder) as partial:
        write_peft(adapter, partial)


def write_peft(adapter: Adapter, folder: Path, base: str | None = None) -> None:
    """Write the two files of peft's layout into a folder, at scale 1, so that who knows of no config reads the same.

    The header remembers the nearest power of two of every scale: a student that starts from the file takes it out of B
    again, exactly, and is trained as if it had never been written.
    """
    plain = adapter.folded()
    tensors = {PEFT + key: value.detach().cpu().contiguous() for key, value in plain.tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", FOLDED: json.dumps(_powers(adapter))})
    config = plain.config()
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def _powers(adapter: Adapter) -> dict[str, int]:
    return {module: round(math.log2(abs(part.scale))) for module, part in adapter.parts.items() if part.scale}


def _folded(header: Mapping[str, str]) -> dict[str, int]:
    powers = _object(header.get(FOLDED, "{}"), f"its header's {FOLDED}")
    return {module: power for module, power in powers.items() if isinstance(power, int) and abs(power) < 64}


@contextmanager
def complete_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to ``folder`` when the block ends, and vanish if it fails.

    Raises:
        ValueError: if the disk is full, or the folder cannot be written to.
    """
    partial = folder / f".partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write to {folder}: {error}; what was there before is unharmed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
