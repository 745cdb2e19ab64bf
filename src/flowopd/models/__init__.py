"""Backbones and their adapters."""

from flowopd.models.backbone import Backbone
from flowopd.models.lora import LoRASpec, Merge
from flowopd.models.sd3 import SD3Backbone

__all__ = ["Backbone", "LoRASpec", "Merge", "SD3Backbone"]
