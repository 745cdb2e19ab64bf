"""LoRA adapters on one shared network, by peft.

Names, shapes and values on disk are peft's: ``adapter_config.json`` beside ``adapter_model.safetensors`` with keys
``base_model.model.<module>.lora_A.weight``. The only place that touches peft's private attributes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowopd.models.files import local_folder, refuse_corrupt
from flowopd.models.shards import whole

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


@dataclass(frozen=True)
class LoRASpec:
    """Shape of a new adapter,  ΔW = alpha / rank · B·A.

    Args:
        rank: inner width of the two factors.
        alpha: strength; the effective factor is alpha / rank.
        targets: module name endings; the default is every attention projection of an SD3 block.
        init: ``gaussian`` or peft's default for A; B starts at zero in both.
    """

    rank: int = 32
    alpha: float = 64
    targets: Sequence[str] = ATTENTION
    init: Literal["gaussian", "default"] = "gaussian"

    def config(self) -> LoraConfig:
        """The same in peft's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            target_modules=list(self.targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: peft's config, and its tensors by ``<module>.lora_A.weight``."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]

    def scale(self) -> float:
        """alpha / rank."""
        return float(self.config.lora_alpha) / int(self.config.r)

    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return [key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight")]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), scale not included."""
        return self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]

    def fingerprint(self) -> str:
        """A short digest of every tensor and of the scale."""
        digest = hashlib.sha256(str(self.scale()).encode())
        for key in sorted(self.tensors):
            digest.update(key.encode())
            digest.update(self.tensors[key].float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter in peft layout is.

    Args:
        path: a folder, or a model id of the hub.
        subfolder: folder inside it.
        revision: branch, tag or commit on the hub.
    """

    path: str
    subfolder: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        inside = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.path}{inside}" + (f"@{self.revision}" if self.revision else "")

    def read(self) -> Adapter:
        """Read it, as ``read_adapter``."""
        return read_adapter(self.path, self.subfolder, self.revision)


def read_adapter(path: str, subfolder: str | None = None, revision: str | None = None) -> Adapter:
    """Read an adapter in peft layout from a folder or from the hub.

    Raises:
        FileNotFoundError: if there is no such folder or model, or a file is missing in it.
        ValueError: if the tensors cannot be read.
    """
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    folder = local_folder("adapter", path, revision, [inside + CONFIG, inside + WEIGHTS]) / inside
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"adapter folder {folder} has no {name}; expected a LoRA saved in peft layout{_elsewhere(folder)}"
            )
    refuse_corrupt(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    return Adapter(_read_config(folder), {k.removeprefix(PREFIX): v for k, v in tensors.items()})


def _read_config(folder: Path) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} is not the config of a LoRA ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder / CONFIG} is a {type(config).__name__}; expected a LoraConfig")
    return config


def _elsewhere(folder: Path) -> str:
    """Where below a folder adapters lie, as a hint."""
    found = sorted(file.parent.relative_to(folder).as_posix() for file in folder.glob(f"*/**/{CONFIG}"))
    return f"; there is one in subfolder {' or '.join(map(repr, found[:4]))}" if found else ""


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in peft layout; the old one, if any, stays until the new one is complete.

    Raises:
        ValueError: if the disk is full, or the folder cannot be written to.
    """
    with complete_or_nothing(folder) as partial:
        write_peft(adapter, partial)


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write the two files of peft's layout into a folder."""
    save_file({PREFIX + k: v.detach().cpu().contiguous() for k, v in adapter.tensors.items()}, folder / WEIGHTS)
    adapter.config.save_pretrained(str(folder))


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


def add_adapter(network: nn.Module, name: str, spec: LoRASpec) -> None:
    """Put a new, trainable float32 adapter on the network."""
    _inject(network, name, spec.config())
    _rest_on_trainable(network)


def attach(network: nn.Module, name: str, adapter: Adapter, trainable: bool = False) -> None:
    """Put a read adapter on the network under ``name``, in float32.

    Raises:
        ValueError: naming missing, extra or mis-shaped tensors, or an adapter whose change is zero.
    """
    _inject(network, name, adapter.config)
    _check_tensors(_tensors(network, name), adapter.tensors, name)
    set_peft_model_state_dict(network, dict(adapter.tensors), adapter_name=name)
    _require_grad(network, name, trainable)
    _rest_on_trainable(network)


def _inject(network: nn.Module, name: str, config: LoraConfig) -> None:
    trainable = {key for key, p in network.named_parameters() if p.requires_grad}
    if name in adapter_names(network):
        raise ValueError(f"the network already carries an adapter named {name!r}")
    try:
        with warnings.catch_warnings():  # peft warns that there are several adapters; that is the point
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, network, adapter_name=name)
    except ValueError as error:
        raise ValueError(f"adapter {name!r} does not fit this network: {error}") from error
    for key, parameter in network.named_parameters():  # peft freezes the others and follows the base's dtype
        parameter.requires_grad_(key in trainable or f".{name}." in key)
        if f".{name}." in key:
            parameter.data = parameter.data.float()
    for layer in _lora_layers(network):
        if name in layer.lora_dropout:
            layer.lora_dropout[name] = nn.Identity()  # dropout would tell the training forward from the rollout's


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> None:
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is not part of this network" for key in found if key not in expected]
    faults += [
        f"{key} has shape {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"adapter {name!r} does not fit this network: {faults[0]}{more}")


def take_adapter(network: nn.Module, name: str) -> Adapter:
    """Copy an adapter off the network; if it is sharded, all ranks must ask for it."""
    config: LoraConfig = network.peft_config[name]  # type: ignore[index, assignment]
    return Adapter(config, {key: whole(value).detach().clone() for key, value in _tensors(network, name).items()})


def adapter_names(network: nn.Module) -> set[str]:
    """Names of all adapters on the network."""
    return {name for layer in _lora_layers(network) for name in layer.lora_A}


def adapter_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the network's order."""
    return [p for key, p in network.named_parameters() if f".{name}." in key and "lora_" in key]


@contextmanager
def use_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Run forwards with one adapter, or with the base model for ``None``; touches no ``requires_grad``.

    Raises:
        KeyError: if no adapter has that name (peft itself would silently answer as the base).
    """
    if name is not None and name not in adapter_names(network):
        raise KeyError(f"no adapter named {name!r}; loaded are {sorted(adapter_names(network))}")
    layers = _lora_layers(network)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = ([], True) if name is None else ([name], False)
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _rest_on_trainable(network: nn.Module) -> None:
    """Leave the student active between calls: checkpointed activations are recomputed at backward, after its own."""
    names = {n for n in adapter_names(network) if any(p.requires_grad for p in adapter_parameters(network, n))}
    for layer in _lora_layers(network):
        layer._active_adapter = sorted(names)


def _lora_layers(network: nn.Module) -> list[LoraLayer]:
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _tensors(network: nn.Module, name: str) -> dict[str, Tensor]:
    marker = f".{name}."
    return {key.replace(marker, "."): p for key, p in network.named_parameters() if marker in key and "lora_" in key}


def _require_grad(network: nn.Module, name: str, trainable: bool) -> None:
    for parameter in adapter_parameters(network, name):
        parameter.requires_grad_(trainable)
