"""LoRA adapters on one shared network, by peft.

Names, shapes and values on disk are peft's: ``adapter_config.json`` beside ``adapter_model.safetensors`` with keys
``base_model.model.<module>.lora_A.weight``. The only place that touches peft's private attributes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
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


def read_adapter(path: str, subfolder: str | None = None, revision: str | None = None) -> Adapter:
    """Read an adapter in peft layout from a folder or from the hub.

    Raises:
        FileNotFoundError: if there is no such folder or model, or a file is missing in it.
        ValueError: if the tensors cannot be read.
    """
    folder = _local_folder(path, subfolder, revision)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter folder {folder} has no {name}; expected a LoRA saved in peft layout")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a readable safetensors file ({error})") from error
    return Adapter(LoraConfig.from_pretrained(str(folder)), {k.removeprefix(PREFIX): v for k, v in tensors.items()})


def _local_folder(path: str, subfolder: str | None, revision: str | None) -> Path:
    root = Path(path)
    if not root.is_dir():
        if root.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise FileNotFoundError(f"adapter folder {path!r} does not exist")
        try:
            root = Path(
                snapshot_download(path, revision=revision, allow_patterns=f"{subfolder}/*" if subfolder else None)
            )
        except Exception as error:  # the hub raises many kinds; all of them mean: not here
            message = f"adapter {path!r} is neither a folder nor a reachable model of the hub"
            raise FileNotFoundError(f"{message} ({type(error).__name__})") from error
    return root / subfolder if subfolder else root


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in peft layout; the old one, if any, stays until the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS}.partial"
    save_file({PREFIX + k: v.detach().cpu().contiguous() for k, v in adapter.tensors.items()}, partial)
    partial.rename(folder / WEIGHTS)
    adapter.config.save_pretrained(str(folder))


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
    """Copy an adapter off the network."""
    config: LoraConfig = network.peft_config[name]  # type: ignore[index, assignment]
    return Adapter(config, {key: value.detach().clone() for key, value in _tensors(network, name).items()})


def adapter_names(network: nn.Module) -> set[str]:
    """Names of all adapters on the network."""
    return {name for layer in _lora_layers(network) for name in layer.lora_A}


def adapter_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the network's order."""
    return [p for key, p in network.named_parameters() if f".{name}." in key and "lora_" in key]


class Merge:
    """One adapter out of several: the mean of what they change.

    Args:
        adapters: adapter folders in peft layout, or models of the hub.
        method: ``exact`` concatenates the factors, so that ΔW = Σ w_i ΔW_i at rank Σ r_i; ``factors`` averages A and B
            separately, as the released Flow-OPD code does: ΔW = (Σ w_i B_i)(Σ w_i A_i), which keeps about 1/k of the
            changes of k independent adapters.
        weights: w_i; default 1/k each.

    References:
        Flow-OPD (arXiv 2605.08063), merge cold start, and its released merge script.
    """

    def __init__(
        self,
        adapters: list[str],
        method: Literal["exact", "factors"] = "exact",
        weights: list[float] | None = None,
    ) -> None:
        if not adapters:
            raise ValueError("a merge needs at least one adapter folder, got none")
        if weights is not None and len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters were given {len(weights)} weights; expected one each")
        self.adapters = adapters
        self.method = method
        self.weights = weights or [1 / len(adapters)] * len(adapters)

    def adapter(self) -> Adapter:
        """Read the adapters and merge them.

        Raises:
            ValueError: if ``factors`` meets adapters of different rank or scale, or an adapter is more than a LoRA.
        """
        parts = [read_adapter(path) for path in self.adapters]
        for part, path in zip(parts, self.adapters, strict=True):
            _check_plain(part, path)
        return (_concatenate if self.method == "exact" else _average_factors)(parts, self.weights)


def _check_plain(adapter: Adapter, path: str) -> None:
    kinds = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
    if unusual := [kind for kind in kinds if getattr(adapter.config, kind, None)]:
        raise ValueError(f"adapter {path!r} has {unusual[0]}; a merge knows only ΔW = alpha / rank · B·A")


def _concatenate(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    scale, rank = max(part.scale() for part in parts), sum(int(part.config.r) for part in parts)
    modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
    tensors: dict[str, Tensor] = {}
    for module in modules:
        owners = [(part, weight) for part, weight in zip(parts, weights, strict=True) if module in part.modules()]
        a = torch.cat([part.factors(module)[0] for part, _ in owners])
        b = torch.cat([w * part.scale() / scale * part.factors(module)[1] for part, w in owners], 1)
        tensors[f"{module}.lora_A.weight"] = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])])
        tensors[f"{module}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], 1)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=modules)  # type: ignore[arg-type]
    return Adapter(config, tensors)


def _average_factors(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    shapes = {(int(part.config.r), part.scale(), *sorted(part.tensors)) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            "factors can only be averaged between adapters of one rank, scale and target; use method: exact"
        )
    keys = parts[0].tensors
    pairs = list(zip(parts, weights, strict=True))
    tensors = {key: torch.stack([weight * part.tensors[key] for part, weight in pairs]).sum(0) for key in keys}
    return Adapter(parts[0].config, tensors)


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
