"""Plain LoRA adapters on one shared network, by peft; the only file that touches peft's private attributes.

An adapter in memory is what it changes and nothing else: two factors and a scale per module. ``files`` makes this form
of what people have, and refuses what it cannot say.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from typing_extensions import override

from flowopd.core.ranges import above, at_least
from flowopd.models.shards import blocks, whole

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

Span = tuple[str, slice]
"""An adapter, and the rows of a forward that have it."""


class _Switches(NamedTuple):
    layers: list[LoraLayer]
    names: set[str]
    mixes_rows: bool


_SWITCHES: WeakKeyDictionary[nn.Module, _Switches] = WeakKeyDictionary()


@dataclass(frozen=True)
class LoRASpec:
    """Shape of a new adapter,  ΔW = alpha / rank · B·A.

    Args:
        rank: inner width of the two factors.
        alpha: strength; the effective factor is alpha / rank.
        targets: module name endings; default: the backbone's, for SD3 every attention projection of a block.
        init: ``gaussian`` or peft's default for A; B starts at zero in both.
    """

    rank: int = 32
    alpha: float = 64
    targets: Sequence[str] | None = None
    init: Literal["gaussian", "default"] = "gaussian"

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank)
        above(0.0, alpha=self.alpha)

    def config(self, targets: Sequence[str] = ATTENTION) -> LoraConfig:
        """The same in peft's words; ``targets`` are meant where it names none."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            target_modules=list(self.targets or targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )


class Factors(NamedTuple):
    """What is changed about one module,  ΔW = scale · B·A."""

    a: Tensor  # (r, in), or (r, in, k, k) for a convolution
    b: Tensor  # (out, r), or (out, r, 1, 1)
    scale: float

    @property
    def rank(self) -> int:
        """Inner width r."""
        return len(self.a)

    def folded(self) -> Factors:
        """The same change at scale 1: B carries it."""
        return Factors(self.a, self.scale * self.b, 1.0)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in·k·k) and B (out, r); scale not included."""
        return self.a.flatten(1), self.b.flatten(1)

    def change(self) -> Tensor:
        """ΔW (out, in·k·k)."""
        a, b = self.matrices()
        return self.scale * b @ a


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA in memory.

    Args:
        parts: factors by the name of the module that they change.
        declared: configs of the files it comes from; what they target has to be there when it is attached.
    """

    parts: Mapping[str, Factors]
    declared: Sequence[LoraConfig] = field(default=(), compare=False, repr=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Factors by ``<module>.lora_A.weight``, as peft calls them; scales not included."""
        return {
            f"{module}.lora_{letter}.weight": factor
            for module, part in self.parts.items()
            for letter, factor in (("A", part.a), ("B", part.b))
        }

    def scaled(self, scale: float) -> Adapter:
        """The same changes times a number."""
        parts = {module: part._replace(scale=scale * part.scale) for module, part in self.parts.items()}
        return Adapter(parts, self.declared)

    def folded(self) -> Adapter:
        """The same changes, every module at scale 1."""
        return Adapter({module: part.folded() for module, part in self.parts.items()}, self.declared)

    def config(self) -> LoraConfig:
        """Ranks and strengths in peft's words, and nothing else: never an initialisation that rewrites the base."""
        ranks = {module: part.rank for module, part in self.parts.items()}
        alphas = {module: part.scale * part.rank for module, part in self.parts.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return LoraConfig(
            r=int(rank),
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
            target_modules=list(self.parts),
            rank_pattern={f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
            alpha_pattern={f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
        )

    def fingerprint(self) -> str:
        """A short digest of what every module is changed by, whatever share of it is called its scale."""
        digest = hashlib.sha256()
        for key, value in sorted(self.folded().tensors.items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def add_adapter(network: nn.Module, name: str, spec: LoRASpec, targets: Sequence[str] = ATTENTION) -> None:
    """Put a new, trainable float32 adapter on the network; ``targets`` are meant where the spec names none."""
    _inject(network, name, spec.config(targets))
    _rest_on_trainable(network)
    every, reached = blocks(network), set(map(id, _adapted(network, name).values()))
    bare = [block for block in every if not any(id(module) in reached for module in block.modules())]
    if bare:
        kind = type(bare[0]).__name__
        warnings.warn(
            f"adapter {name!r} changes nothing in {len(bare)} of {len(every)} blocks, such as a {kind}; if that is not "
            "meant, name modules of theirs in its targets",
            stacklevel=2,
        )


def attach(network: nn.Module, name: str, adapter: Adapter, trainable: bool = False) -> None:
    """Put an adapter on the network under ``name``, in float32; the network's own weights stay as they are.

    Raises:
        ValueError: naming a module that is missing, extra or mis-shaped.
    """
    if faults := _misfits(network, adapter):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"adapter {name!r} does not fit this network: {faults[0]}{more}")
    config = adapter.config()
    config.target_modules = "|".join(map(re.escape, adapter.parts))  # whole names: a list would mean endings
    _inject(network, name, config)
    for module, layer in _adapted(network, name).items():
        part = adapter.parts[module]
        for ours, theirs in zip(_factors(layer, name), (part.a, part.b), strict=True):
            ours.data.copy_(theirs)
        layer.scaling[name] = part.scale
    for parameter in adapter_parameters(network, name):
        parameter.requires_grad_(trainable)
    _rest_on_trainable(network)


class _Linear(PeftLinear):
    """Peft's layer of plain adapters, without its temporaries; rows may have adapters of their own."""

    spans: Sequence[Span] = ()

    @override
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return result
        for name, rows in self.spans:
            if name in self.lora_A:
                result[rows] = self._changed(name, result[rows], x[rows])
        for name in () if self.spans else self.active_adapters:
            if name in self.lora_A:
                result = self._changed(name, result, x)
        return result

    def _changed(self, name: str, result: Tensor, x: Tensor) -> Tensor:
        """result + scale · B·A·x, in the adapter's precision, or in autocast's."""
        a, b = _factors(self, name)
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which casts to its own precision, and only once
        inner = F.linear(x if autocast else x.to(a.dtype), a).flatten(0, -2)
        start = result.flatten(0, -2).to(inner.dtype)
        changed = torch.addmm(start, inner, b.to(inner.dtype).t(), alpha=self.scaling[name])
        return changed.view(result.shape).to(result.dtype)


def _inject(network: nn.Module, name: str, config: LoraConfig) -> None:
    config._register_custom_module({nn.Linear: _Linear})
    trainable = {key for key, p in network.named_parameters() if p.requires_grad}
    if name in adapter_names(network):
        raise ValueError(f"the network already carries an adapter named {name!r}")
    _SWITCHES.pop(network, None)
    try:
        with warnings.catch_warnings():  # peft warns that there are several adapters; that is the point
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", message=".*without `get_apply_tensor_subclass`")  # to merge; we do not
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


def _misfits(network: nn.Module, adapter: Adapter) -> list[str]:
    """What an adapter has that the network has not, in another shape, or the other way round."""
    layers = _adaptable(network)
    faults = []
    for module, part in adapter.parts.items():
        if module not in layers:
            faults.append(f"{module} is not part of this network, or neither a linear layer nor a convolution")
            continue
        layer = layers[module]
        linear = isinstance(layer, nn.Linear)  # whose weight, if it is quantised, may have another shape
        out, *into = (layer.out_features, layer.in_features) if linear else layer.weight.shape
        expected = {"A": (part.rank, *into), "B": (out, part.rank, *(1 for _ in into[1:]))}
        for letter, factor in (("A", part.a), ("B", part.b)):
            if factor.shape != expected[letter]:
                faults.append(f"{module}.lora_{letter} has shape {tuple(factor.shape)} instead of {expected[letter]}")
    missing = {module for config in adapter.declared for module in _targets(config, layers)} - set(adapter.parts)
    return faults + [f"{module} is targeted by its config, but its tensors are missing" for module in sorted(missing)]


def _adaptable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that a LoRA can change, as they are below any adapters, by name."""
    layers = {}
    for module, layer in network.named_modules():
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if isinstance(base, nn.Linear | nn.Conv2d) and ".lora_" not in module and not module.endswith(".base_layer"):
            layers[module] = base
    return layers


def _targets(config: LoraConfig, layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers that peft would adapt by a config."""
    if config.target_modules == "all-linear":
        config = copy(config)
        config.target_modules = [module for module, layer in layers.items() if isinstance(layer, nn.Linear)]
    return [module for module in layers if check_target_module_exists(config, module)]


def take_adapter(network: nn.Module, name: str) -> Adapter:
    """Copy an adapter off the network; if it is sharded, all ranks must ask for it."""
    parts = {}
    for module, layer in _adapted(network, name).items():
        a, b = (whole(factor).detach().clone() for factor in _factors(layer, name))
        parts[module] = Factors(a, b, float(layer.scaling[name]))
    return Adapter(parts)


@torch.no_grad()
def follow(network: nn.Module, name: str, leader: str, kept: float) -> None:
    """Move an adapter towards another one of its shape,  θ ← kept · θ + (1 - kept) · θ_leader; shards move alone."""
    for mine, theirs in zip(adapter_parameters(network, name), adapter_parameters(network, leader), strict=True):
        mine.mul_(kept).add_(theirs, alpha=1 - kept)


def adapter_scales(network: nn.Module, name: str) -> dict[str, float]:
    """The strength of an adapter by module, in the network's order."""
    return {module: float(layer.scaling[name]) for module, layer in _adapted(network, name).items()}


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
    layers, names, _ = _switches(network)
    if name is not None and name not in names:
        raise KeyError(f"no adapter named {name!r}; loaded are {sorted(names)}")
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = ([], True) if name is None else ([name], False)
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def use_adapters(network: nn.Module, adapters: Sequence[tuple[str | None, int]]) -> Iterator[None]:
    """Run forwards without gradient whose rows have adapters of their own, or none.

    Args:
        network: its adapted layers see the batch as their first axis.
        adapters: names, and how many rows each has, one after another.

    Raises:
        KeyError: if no adapter has a name.
    """
    ends = list(accumulate(count for _, count in adapters))
    spans = [(name, slice(end - count, end)) for (name, count), end in zip(adapters, ends, strict=True) if name]
    if not spans:
        with use_adapter(network, None):
            yield
        return
    with use_adapter(network, spans[0][0]):
        layers, names, _ = _switches(network)
        if unknown := [name for name, _ in spans if name not in names]:
            raise KeyError(f"no adapter named {unknown[0]!r}; loaded are {sorted(names)}")
        linear = [layer for layer in layers if isinstance(layer, _Linear)]
        try:
            for layer in linear:
                layer.spans = spans
            yield
        finally:
            for layer in linear:
                layer.spans = ()


def mixes_rows(network: nn.Module) -> bool:
    """Whether rows of one forward may have adapters of their own: all adapted layers are linear, and in blocks.

    Before and behind the blocks some models see the tokens of all rows as one axis.
    """
    return _switches(network).mixes_rows


def _switches(network: nn.Module) -> _Switches:
    """What a switch of adapters touches; looked for once, until another adapter is put on."""
    if network not in _SWITCHES:
        layers, inside = _lora_layers(network), {layer for block in blocks(network) for layer in block.modules()}
        mixes_rows = all(isinstance(layer, _Linear) and layer in inside for layer in layers)
        _SWITCHES[network] = _Switches(layers, adapter_names(network), mixes_rows)
    return _SWITCHES[network]


def _rest_on_trainable(network: nn.Module) -> None:
    """Leave the student active between calls: checkpointed activations are recomputed at backward, after its own."""
    names = {n for n in adapter_names(network) if any(p.requires_grad for p in adapter_parameters(network, n))}
    for layer in _lora_layers(network):
        layer._active_adapter = sorted(names)


def _lora_layers(network: nn.Module) -> list[LoraLayer]:
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _adapted(network: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that carry an adapter, by name, in the network's order."""
    return {
        module: layer
        for module, layer in network.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }


def _factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapter on a layer."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight  # type: ignore[return-value]
