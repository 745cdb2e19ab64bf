"""Backbones and their adapters."""

from flowopd.models.adapters.files import AdapterSource
from flowopd.models.adapters.lora import LoRASpec
from flowopd.models.adapters.merge import Merge
from flowopd.models.backbone import Backbone, Question
from flowopd.models.pipeline import DiffusersBackbone
from flowopd.models.qwen import QwenImageBackbone
from flowopd.models.sd3 import SD3Backbone
from flowopd.models.zimage import ZImageBackbone

__all__ = [
    "AdapterSource",
    "Backbone",
    "DiffusersBackbone",
    "LoRASpec",
    "Merge",
    "Question",
    "QwenImageBackbone",
    "SD3Backbone",
    "ZImageBackbone",
]
