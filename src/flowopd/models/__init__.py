"""Backbones and their adapters."""

from flowopd.models.adapters.files import AdapterSource
from flowopd.models.adapters.lora import LoRASpec, use_adapter
from flowopd.models.adapters.merge import Merge
from flowopd.models.backbone import Backbone, Question
from flowopd.models.flux import Flux2KleinBackbone, FluxBackbone
from flowopd.models.pipeline import DiffusersBackbone
from flowopd.models.qwen import QwenImageBackbone
from flowopd.models.sd3 import SD3Backbone
from flowopd.models.textcache import TextMemory
from flowopd.models.texts import TextEncoders
from flowopd.models.zimage import ZImageBackbone

__all__ = [
    "AdapterSource",
    "Backbone",
    "DiffusersBackbone",
    "Flux2KleinBackbone",
    "FluxBackbone",
    "LoRASpec",
    "Merge",
    "Question",
    "QwenImageBackbone",
    "SD3Backbone",
    "TextEncoders",
    "TextMemory",
    "ZImageBackbone",
    "use_adapter",
]
