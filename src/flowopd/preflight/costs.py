"""What forwards cost, by tracing the transformer on the meta device; and what they take on a device that is here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flowopd.models import LoRASpec
from flowopd.models.shards import blocks
from flowopd.preflight.shapes import Shapes, materialise
from flowopd.records import Conditioning


@dataclass(frozen=True)
class Cost:
    """What one row of the transformer costs; guidance makes two rows of an image.

    Args:
        forward, backward: FLOP.
        kept: bytes that a training forward keeps for backward.
        kept_checkpointed: the same with activation checkpointing.
        block: bytes that the largest block keeps; checkpointing computes them again, a block at a time.
    """

    forward: float
    backward: float
    kept: float
    kept_checkpointed: float
    block: float

    def activations(self, checkpointing: bool) -> float:
        """Bytes per row at the worst moment of backward."""
        return self.kept_checkpointed + self.block if checkpointing else self.kept


class _OnDevice(TorchFunctionMode):
    """Makes a trace keep what an accelerator would keep: fused attention, and linear layers under autocast."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is F.scaled_dot_product_attention:
            read = args[:3] or [kwargs[name] for name in ("query", "key", "value")]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*read)[0]
        if func is F.linear and self.autocast:
            args = [value if value is None else value.to(torch.bfloat16) for value in args]
        return func(*args, **(kwargs or {}))


def trace(shapes: Shapes, lora: LoRASpec, autocast: bool) -> Cost:
    """Run the transformer with an adapter forward and backward on the meta device, and count."""
    network = shapes.adapted(lora)
    network.disable_gradient_checkpointing()
    with flop_counter() as forward:
        velocity, kept = _forward(network, shapes, autocast)
    with flop_counter() as backward:
        velocity.float().sum().backward()
    network.enable_gradient_checkpointing()
    _, checkpointed = _forward(network, shapes, autocast)
    flop = float(forward.get_total_flops()), float(backward.get_total_flops())
    return Cost(*flop, kept.total(), checkpointed.total(), kept.largest())


def forward_flop(model: Shapes, asked: Shapes) -> float:
    """FLOP of a forward of a model, without adapters, at one row of another's states and texts."""
    with torch.no_grad(), _OnDevice(autocast=False), flop_counter() as counted:
        model.transformer()(**model.backbone.inputs(*one_state(asked)))
    return float(counted.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Counts FLOP, those of attention too: torch 2.11 does not know the operator that ``_OnDevice`` calls."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _forward(network: nn.Module, shapes: Shapes, autocast: bool) -> tuple[Tensor, _Kept]:
    kept = _Kept(network)
    with _OnDevice(autocast), kept:
        return run(network, shapes, *one_state(shapes)), kept


def one_state(
    shapes: Shapes, rows: int = 1, device: torch.device | str = "meta"
) -> tuple[Tensor, Tensor, Conditioning]:
    """States, noise levels and texts of some rows; on another device than meta their numbers are random."""
    x = torch.randn(rows, *shapes.latent, device=device, dtype=shapes.backbone.dtype)
    return x, torch.full((rows,), 0.5, device=device), shapes.text(rows, device)


def run(network: nn.Module, shapes: Shapes, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """The velocity (B, C, H, W) of a transformer of a backbone's family."""
    return shapes.backbone.velocity_from(network(**shapes.backbone.inputs(x, sigma, cond), return_dict=False), x)


class _Kept:
    """Bytes that autograd keeps for backward, by block; weights are not counted, shared storages once."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
        self._storages: dict[int, tuple[Any, int]] = {}  # kept alive, or an address would be used twice
        self._blocks = blocks(network)
        self._current = -1
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> None:
        for number, block in enumerate(self._blocks):
            self._handles += [
                block.register_forward_pre_hook(lambda *_, number=number: self._enter(number)),
                block.register_forward_hook(lambda *_: self._enter(-1)),
            ]
        self._hooks.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def total(self) -> float:
        return float(sum(storage.nbytes() for storage, _ in self._storages.values()))

    def largest(self) -> float:
        sizes = Counter[int]()
        for storage, block in self._storages.values():
            sizes[block] += storage.nbytes()
        return float(max((size for block, size in sizes.items() if block >= 0), default=0))

    def _enter(self, block: int) -> None:
        self._current = block

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages.setdefault(storage._cdata, (storage, self._current))
        return tensor


def decode_flop(shapes: Shapes) -> float:
    """FLOP of decoding one picture."""
    latents = torch.empty(1, *shapes.latent, device="meta", dtype=shapes.backbone.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        shapes.backbone.pixels(shapes.autoencoder(), latents)
    return float(counted.get_total_flops())


def decode_bytes(shapes: Shapes, rows: int) -> float:
    """Bytes at the worst moment of decoding some pictures at once, without what a convolution works in."""
    latents = torch.empty(rows, *shapes.latent, device="meta", dtype=shapes.backbone.dtype)
    alive, autoencoder = _Alive(), shapes.autoencoder()
    with torch.no_grad(), _OnDevice(autocast=False), alive:
        shapes.backbone.pixels(autoencoder, latents)
    return float(alive.most)


class _Alive(TorchDispatchMode):
    """The most bytes that were alive at once, of what was made on the way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return made


@dataclass(frozen=True)
class Speed:
    """Seconds per row of the transformer, on random weights of the true size.

    Args:
        forward: without gradient.
        trained: forward and backward.
    """

    forward: float
    trained: float


def measure(shapes: Shapes, lora: LoRASpec, rows: int, autocast: bool, device: str, repeats: int = 3) -> Speed:
    """Time forwards and training steps of some rows with random weights on ``device``."""
    network = Shapes(shapes.backbone).adapted(lora)
    materialise(network, device)
    if shapes.backbone.activation_checkpointing:
        network.enable_gradient_checkpointing()
    state = one_state(shapes, rows, device)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            velocity = run(network, shapes, *state)
        return velocity.float()

    def trained() -> None:
        forward().square().mean().backward()

    return Speed(
        seconds_of(torch.no_grad()(forward), device, repeats) / rows, seconds_of(trained, device, repeats) / rows
    )


def seconds_of(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds that a piece of work takes; a first time is not counted."""
    work()
    started = now(device)
    for _ in range(repeats):
        work()
    return (now(device) - started) / repeats


def now(device: str) -> float:
    """Seconds on a clock, when the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
