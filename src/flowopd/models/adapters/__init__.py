"""Adapters: on a network and on disk, merged, and exported."""

from flowopd.models.adapters.files import AdapterSource, read_adapter, save_adapter
from flowopd.models.adapters.lora import (
    Adapter,
    LoRASpec,
    adapter_parameters,
    add_adapter,
    attach,
    take_adapter,
    use_adapter,
)
from flowopd.models.adapters.merge import Merge

__all__ = [
    "Adapter",
    "AdapterSource",
    "LoRASpec",
    "Merge",
    "adapter_parameters",
    "add_adapter",
    "attach",
    "read_adapter",
    "save_adapter",
    "take_adapter",
    "use_adapter",
]
