"""The models that are timed: the built-in world, and small random ones of true shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import tiny_families
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel

from flowopd.models import DiffusersBackbone, SD3Backbone, ZImageBackbone
from flowopd.tiles import asset


@dataclass(frozen=True)
class Model:
    """A pipeline folder, and the backbone that reads it.

    Args:
        about: its size in words.
        write: puts the pipeline into a folder, and says where it is.
        backbone: its class.
        options: what the backbone is given.
    """

    about: str
    write: Callable[[Path], Path]
    backbone: type[DiffusersBackbone]
    options: dict[str, object]

    def unread(self, folder: Path) -> DiffusersBackbone:
        return self.backbone(str(folder), dtype="float32", **self.options)


def tiny_sd3(folder: Path) -> Path:
    """Four layers of width 256, two of them with a second attention; 64 image tokens and 24 of text."""
    pipeline = tiny.pipeline()
    torch.manual_seed(0)
    shape = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64, "caption_projection_dim": 256}
    shape |= {"sample_size": 16, "pos_embed_max_size": 16, "dual_attention_layers": (0, 1)}
    pipeline.transformer = SD3Transformer2DModel(**(dict(tiny.transformer().config) | shape))
    pipeline.save_pretrained(folder)
    return folder


def tiny_zimage(folder: Path) -> Path:
    """Four layers of width 256 and two that refine; 64 image tokens."""
    pipeline = tiny_families.zimage()
    torch.manual_seed(0)
    shape = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 16, 16]}
    pipeline.transformer = ZImageTransformer2DModel(**(dict(pipeline.transformer.config) | shape)).eval()
    for token in (pipeline.transformer.x_pad_token, pipeline.transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipeline.save_pretrained(folder)
    return folder


MODELS = {
    "tiles": Model("3 layers x 128, 16 image tokens", lambda _: asset("base"), SD3Backbone, {"max_sequence_length": 0}),
    "tiny-sd3": Model("4 layers x 256, 64 image tokens", tiny_sd3, SD3Backbone, {"max_sequence_length": 8}),
    "tiny-zimage": Model("4 + 2 layers x 256, 64 image tokens", tiny_zimage, ZImageBackbone, {"resolution": 32}),
}
