"""Adapters: on a network and on disk, merged, and exported."""

from flowopd.models.adapters.files import AdapterSource
from flowopd.models.adapters.lora import Adapter, LoRASpec
from flowopd.models.adapters.merge import Merge

__all__ = ["Adapter", "AdapterSource", "LoRASpec", "Merge"]
