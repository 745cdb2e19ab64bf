"""Backbones and their adapters."""

from flowopd.models.adapters.files import AdapterSource
from flowopd.models.adapters.lora import LoRASpec
from flowopd.models.adapters.merge import Merge
from flowopd.models.backbone import Backbone
from flowopd.models.sd3 import SD3Backbone

__all__ = ["AdapterSource", "Backbone", "LoRASpec", "Merge", "SD3Backbone"]
