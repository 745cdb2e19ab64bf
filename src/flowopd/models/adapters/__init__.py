"""Adapters: on a network and on disk, merged, and exported."""

from flowopd.models.adapters.lora import Adapter, AdapterSource, LoRASpec
from flowopd.models.adapters.merge import Merge

__all__ = ["Adapter", "AdapterSource", "LoRASpec", "Merge"]
