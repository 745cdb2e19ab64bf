"""Names of factors in files, as peft, diffusers, kohya's scripts and ComfyUI spell them; of modules as well.

diffusers converts whole checkpoints from the original names of SD3's modules, but no adapters, and those of the other
families only for a pipeline that is there; the tables below say the same for factors (tests hold them to diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from flowopd.models.adapters.config import AGAIN

PEFT = "base_model.model."
DOTTED = (PEFT, "transformer.", "model.diffusion_model.", "diffusion_model.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.(?P<name>[^.]+))?\.weight|lora_(?P<way>down|up)\.weight|alpha)"
)
TEXT = r"^(text_encoder|lora_te|te\d)"
MORE = {  # what else is found in such files, in the order in which it is looked for
    r"lora_magnitude_vector|dora_scale": "is a DoRA, whose trained magnitudes are not of the form B·A",
    TEXT: "adapts the text encoders too, which stay as they are here and are shared",
    r"hada_|lokr_|oft_|ia3_|vera_|lora_(mid|embedding|E|ranknum)|\.[ab][12]\.weight": "is another kind of adapter",
    r"\.(bias|diff_b|b_norm)$": "has trained biases",
    r"\.(weight|diff|set_weight|w_norm)$": "has whole trained modules",
}
QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
JOINT = {  # a joint block of SD3, in the original names; the fused projections of q, k and v are three modules here
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ADDED,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
DOUBLE = {  # a block of two streams of FLUX.1
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ADDED,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
FLUX_2 = {  # where it differs from FLUX.1, by outputs per input
    ("img_mlp.0", 6): ("ff.linear_in",),
    ("img_mlp.2", 1 / 3): ("ff.linear_out",),
    ("txt_mlp.0", 6): ("ff_context.linear_in",),
    ("txt_mlp.2", 1 / 3): ("ff_context.linear_out",),
    ("linear1", 9): ("attn.to_qkv_mlp_proj",),
    ("linear2", 1 / 4): ("attn.to_out",),
}
Z_IMAGE = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
BLOCKS = {  # the list of blocks here, and its modules, by the original name of the list
    "joint_blocks": ("transformer_blocks", JOINT),
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
    **{name: (name, Z_IMAGE) for name in ("layers", "noise_refiner", "context_refiner")},
}
SAME = (  # names of modules that are the original ones
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),  # of Z-Image
    *("img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1"),  # of Qwen-Image
    *("txt_mlp.net.0.proj", "txt_mlp.net.2", "txt_mod.1"),
)
OUTSIDE = {  # of the blocks
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
TABLES = (JOINT, DOUBLE, SINGLE, Z_IMAGE)
NAMES = {
    *SAME,
    *(name for table in TABLES for name in (*table, *(part for parts in table.values() for part in parts))),
    *(part for parts in FLUX_2.values() for part in parts),
    *(name for pair in OUTSIDE.items() for name in pair),
}
UNFLAT = {name.replace(".", "_"): name for name in NAMES}
LISTS = "|".join((*BLOCKS, "transformer_blocks", "single_transformer_blocks"))


class Found(NamedTuple):
    """Factors as a file has them; ``alpha`` where it stands beside them."""

    a: Tensor
    b: Tensor
    alpha: float | None


def find_factors(tensors: Mapping[str, Tensor]) -> dict[str, Found]:
    """The factors of every module, by diffusers' name of it, from a file in any layout.

    Raises:
        ValueError: if there is anything in the file that is not the factor of a LoRA, or only half of one.
    """
    found: dict[str, Found] = {}
    for written, halves in _halves(tensors).items():
        for letter in "AB":
            if letter not in halves:
                raise ValueError(f"lacks the factor {letter} of {written}; the file is incomplete")
        alpha = _alpha(written, halves["alpha"]) if "alpha" in halves else None
        for module, a, b in _modules(written, halves["A"], halves["B"]):
            if module in found:
                raise ValueError(f"has {module} twice, under different names; expected one adapter in a file")
            found[module] = Found(a, b, alpha)
    if not found:
        raise ValueError("has no tensors of a LoRA")
    return found


def _halves(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A, B and alpha by the module's name as it is written."""
    renamed = convert_unet_state_dict_to_peft(dict(tensors))  # diffusers' older names
    halves: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, value in renamed.items():
        match = KEY.fullmatch(key)
        if match is None or re.search(TEXT, key):
            raise ValueError(_refusal(key))
        letter = match["letter"] or {"down": "A", "up": "B", None: "alpha"}[match["way"]]
        halves.setdefault(match["module"], {})[letter] = value
        names |= {match["name"]} if letter != "alpha" else set()
    if len(names) > 1 or len(renamed) < len(tensors):
        called = f" ({', '.join(sorted(map(str, names)))})" if len(names) > 1 else ""
        raise ValueError(f"has several adapters{called} in one file; save the one that is meant")
    return halves


def _refusal(key: str) -> str:
    for pattern, what in MORE.items():
        if re.search(pattern, key):
            return f"{what} ({key}); {AGAIN}"
    return f"has {key}, which is no factor of a LoRA in a layout of peft, diffusers, kohya or ComfyUI"


def _alpha(written: str, value: Tensor) -> float:
    if value.numel() != 1 or not bool(torch.isfinite(value.float()).all()):
        raise ValueError(f"has no finite number in {written}.alpha; alpha / rank is its strength")
    return float(value)


def _modules(written: str, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The modules here that one of a file stands for, each with its factors."""
    name = _dotted(written)
    if name.endswith("adaLN_modulation.1") and len(b) == 2 * a[0].numel():  # of an output: (shift, scale) there
        b = torch.cat(b.chunk(2)[::-1])
    names = _names(written, name, len(b) / a[0].numel())
    sizes = [len(b) // len(names)] * len(names)
    if len(names) == len(SINGLE["linear1"]):  # the last is four times as wide as q, k and v
        sizes = [len(b) // 7 * share for share in (1, 1, 1, 4)]
    if len(b) != sum(sizes):
        raise ValueError(f"has {len(b)} outputs in {written}; expected q, k and v of one size")
    yield from ((module, a.clone(), rows.clone()) for module, rows in zip(names, b.split(sizes), strict=True))


def _names(written: str, name: str, outputs_per_input: float) -> list[str]:
    """The names here of a module without prefix, most often one."""
    block = re.fullmatch(rf"({'|'.join(BLOCKS)})\.(\d+)\.(.+)", name)
    if block is None:
        return [OUTSIDE.get(name, name)]
    place, table = BLOCKS[block[1]]
    parts = FLUX_2.get((block[3], outputs_per_input)) or table.get(block[3])
    if parts is None and table is not Z_IMAGE:
        raise ValueError(f"has {written}, which is no module of a transformer that is known here")
    return [f"{place}.{block[2]}.{part}" for part in parts or (block[3],)]


def _dotted(written: str) -> str:
    """A module's name without prefix and with its dots."""
    for prefix in DOTTED:
        if written.startswith(prefix):
            return written.removeprefix(prefix)
    for prefix in FLAT:
        if written.startswith(prefix):
            flat = re.fullmatch(rf"(?:({LISTS})_(\d+)_)?(.+)", written.removeprefix(prefix))
            if flat is None or flat[3] not in UNFLAT:
                raise ValueError(f"has {written}, which is no module of a transformer that is known here")
            return (f"{flat[1]}.{flat[2]}." if flat[1] else "") + UNFLAT[flat[3]]
    return written
