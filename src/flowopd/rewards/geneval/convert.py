"""``flowopd convert``: GenEval's official detector, a checkpoint of mmdet, as a Mask2Former folder of transformers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mask2FormerConfig, SwinConfig

from flowopd.prompts.geneval import OBJECTS
from flowopd.rewards.geneval.detector import read_detector
from flowopd.rewards.model import read_tensors

OFFICIAL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
LEVELS, POINTS = 3, 4  # of deformable attention, in every Mask2Former


class Rule(NamedTuple):
    """Names that match ``old`` as a whole become ``new``; a tensor with several new names is cut along its rows."""

    old: str
    new: tuple[str, ...]


def _rules(old: str, new: str, table: Mapping[str, str | tuple[str, ...]]) -> list[Rule]:
    """One rule per row of the table, each below ``old`` and ``new``."""
    rows = [(key, (names,) if isinstance(names, str) else names) for key, names in table.items()]
    return [Rule(rf"{old}\.{key}", tuple(f"{new}.{name}" for name in names)) for key, names in rows]


# mmdet 2 numbers the attentions of a layer in the order they run, mmdet 3 names them; both names are read.
_LINEAR = r"\.(weight|bias)"
_FFN = r"(?:ffns\.0|ffn)\.layers"
_SWIN, _PIXELS, _QUERIES = (
    "model.pixel_level_module.encoder",
    "model.pixel_level_module.decoder",
    "model.transformer_module",
)
RULES = [
    *_rules(
        "backbone",
        _SWIN,
        {
            r"patch_embed\.projection" + _LINEAR: r"embeddings.patch_embeddings.projection.\1",
            r"patch_embed\.norm" + _LINEAR: r"embeddings.norm.\1",
            **{rf"norm{i}" + _LINEAR: rf"hidden_states_norms.stage{i + 1}.\1" for i in range(4)},
            r"stages\.(\d+)\.downsample\.(norm|reduction)" + _LINEAR: r"encoder.layers.\1.downsample.\2.\3",
        },
    ),
    *_rules(
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)",
        rf"{_SWIN}.encoder.layers.\1.blocks.\2",
        {
            r"norm1" + _LINEAR: r"layernorm_before.\3",
            r"norm2" + _LINEAR: r"layernorm_after.\3",
            r"attn\.w_msa\.relative_position_bias_table": "attention.self.relative_position_bias_table",
            r"attn\.w_msa\.qkv" + _LINEAR: tuple(rf"attention.self.{one}.\3" for one in ("query", "key", "value")),
            r"attn\.w_msa\.proj" + _LINEAR: r"attention.output.dense.\3",
            r"ffn\.layers\.0\.0" + _LINEAR: r"intermediate.dense.\3",
            r"ffn\.layers\.1" + _LINEAR: r"output.dense.\3",
        },
    ),
    *_rules(
        r"panoptic_head\.pixel_decoder",
        _PIXELS,
        {
            r"level_encoding\.weight": "level_embed",
            r"input_convs\.(\d)\.conv" + _LINEAR: r"input_projections.\1.0.\2",
            r"input_convs\.(\d)\.gn" + _LINEAR: r"input_projections.\1.1.\2",
            r"lateral_convs\.0\.conv\.weight": "adapter_1.0.weight",
            r"lateral_convs\.0\.gn" + _LINEAR: r"adapter_1.1.\1",
            r"output_convs\.0\.conv\.weight": "layer_1.0.weight",
            r"output_convs\.0\.gn" + _LINEAR: r"layer_1.1.\1",
            r"mask_feature" + _LINEAR: r"mask_projection.\1",
        },
    ),
    *_rules(
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)",
        rf"{_PIXELS}.encoder.layers.\1",
        {
            r"(?:attentions\.0|self_attn)\.(sampling_offsets|attention_weights|value_proj|output_proj)"
            + _LINEAR: r"self_attn.\2.\3",
            r"norms\.0" + _LINEAR: r"self_attn_layer_norm.\2",
            r"norms\.1" + _LINEAR: r"final_layer_norm.\2",
            _FFN + r"\.0\.0" + _LINEAR: r"fc1.\2",
            _FFN + r"\.1" + _LINEAR: r"fc2.\2",
        },
    ),
    *_rules(
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)",
        rf"{_QUERIES}.decoder.layers.\1",
        {
            r"(?:attentions\.0|cross_attn)\.attn\.in_proj_(weight|bias)": r"cross_attn.in_proj_\2",
            r"(?:attentions\.0|cross_attn)\.attn\.out_proj" + _LINEAR: r"cross_attn.out_proj.\2",
            r"(?:attentions\.1|self_attn)\.attn\.in_proj_(weight|bias)": tuple(
                rf"self_attn.{one}_proj.\2" for one in "qkv"
            ),
            r"(?:attentions\.1|self_attn)\.attn\.out_proj" + _LINEAR: r"self_attn.out_proj.\2",
            r"norms\.0" + _LINEAR: r"cross_attn_layer_norm.\2",
            r"norms\.1" + _LINEAR: r"self_attn_layer_norm.\2",
            r"norms\.2" + _LINEAR: r"final_layer_norm.\2",
            _FFN + r"\.0\.0" + _LINEAR: r"fc1.\2",
            _FFN + r"\.1" + _LINEAR: r"fc2.\2",
        },
    ),
    *_rules(
        "panoptic_head",
        _QUERIES,
        {
            r"transformer_decoder\.post_norm" + _LINEAR: r"decoder.layernorm.\1",
            r"query_embed\.weight": "queries_embedder.weight",
            r"query_feat\.weight": "queries_features.weight",
            r"level_embed\.weight": "level_embed.weight",
            **{rf"mask_embed\.{2 * i}" + _LINEAR: rf"decoder.mask_predictor.mask_embedder.{i}.0.\1" for i in range(3)},
        },
    ),
    Rule(r"panoptic_head\.cls_embed" + _LINEAR, (r"class_predictor.\1",)),
]


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's tensors under the names, and in the layout, of a published Mask2Former of transformers.

    Queries, keys and values that mmdet stacks are cut apart; the channels of 2 × 2 merged patches change from
    channel-major to patch-major order; tables of window positions are left out, since they are computed.

    Raises:
        ValueError: if a tensor is not one of a Mask2Former over Swin.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index"):
            continue
        if not (names := _new_names(name)):
            unknown.append(name)
        elif len(names) > 1:
            converted |= dict(zip(names, tensor.chunk(len(names)), strict=True))
        else:
            converted[names[0]] = _patch_major(tensor) if ".downsample." in name else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(tensors)} tensors are not those of mmdet's Mask2Former over Swin, such as "
            f"{unknown[0]}; expected GenEval's detector, {OFFICIAL}"
        )
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _new_names(name: str) -> list[str]:
    for rule in RULES:
        if match := re.fullmatch(rule.old, name):
            return [match.expand(new) for new in rule.new]
    return []


def _patch_major(tensor: Tensor) -> Tensor:
    """Last axis from (channel, row, column) of a 2 × 2 patch to (column, row, channel)."""
    patches: Tensor = tensor.unflatten(-1, (-1, 2, 2))
    return patches.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)


def config_of(tensors: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The architecture that mmdet's tensors are of.

    Raises:
        ValueError: if one that tells a size is missing.
    """
    try:
        return _config_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except KeyError as error:
        raise ValueError(f"no tensor {error.args[0]!r}; expected GenEval's detector, {OFFICIAL}") from error


def _config_of(shapes: Mapping[str, tuple[int, ...]]) -> Mask2FormerConfig:
    pixels, queries = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    offsets = next((name for name in shapes if name.endswith("sampling_offsets.bias")), f"{pixels} sampling_offsets")
    labels = shapes["panoptic_head.cls_embed.bias"][0] - 1
    return Mask2FormerConfig(
        backbone_config=_swin_config_of(shapes),
        architectures=["Mask2FormerForUniversalSegmentation"],
        id2label=dict(enumerate(OBJECTS)) if labels == len(OBJECTS) else {i: str(i) for i in range(labels)},
        num_queries=shapes["panoptic_head.query_feat.weight"][0],
        hidden_dim=shapes["panoptic_head.query_feat.weight"][1],
        feature_size=shapes[f"{pixels}.level_encoding.weight"][1],
        mask_feature_size=shapes[f"{pixels}.mask_feature.bias"][0],
        num_attention_heads=shapes[offsets][0] // (LEVELS * POINTS * 2),
        encoder_layers=_count(shapes, rf"{pixels}\.encoder\.layers\.(\d+)\..*"),
        encoder_feedforward_dim=_width(shapes, rf"{pixels}\.encoder\.layers\.0\.{_FFN}\.0\.0\.bias"),
        decoder_layers=_count(shapes, rf"{queries}\.layers\.(\d+)\..*") + 1,  # one more set of logits than layers
        dim_feedforward=_width(shapes, rf"{queries}\.layers\.0\.{_FFN}\.0\.0\.bias"),
    )


def _swin_config_of(shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig:
    width = shapes["backbone.patch_embed.projection.bias"][0]
    block = "backbone.stages.{}.blocks.0"
    tables = [shapes[f"{block.format(i)}.attn.w_msa.relative_position_bias_table"] for i in range(4)]
    return SwinConfig(
        embed_dim=width,
        depths=[_count(shapes, rf"backbone\.stages\.{i}\.blocks\.(\d+)\..*") for i in range(4)],
        num_heads=[heads for _, heads in tables],
        window_size=(int(tables[0][0] ** 0.5) + 1) // 2,  # a table has (2 · window - 1)² rows
        mlp_ratio=shapes[f"{block.format(0)}.ffn.layers.0.0.bias"][0] / width,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """Number of distinct layers that a pattern numbers."""
    return len({match[1] for name in shapes if (match := re.fullmatch(pattern, name))})


def _width(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    found = next((shape for name, shape in shapes.items() if re.fullmatch(pattern, name)), None)
    if found is None:
        raise KeyError(pattern.replace("\\", ""))
    return found[0]


def read_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """Tensors of an mmdet checkpoint, without unpickling anything else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or holds more than tensors and plain values.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(source)!r}; download GenEval's detector from {OFFICIAL}")
    if path.suffix == ".safetensors":
        return load_file(path)
    content = read_tensors(path)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"checkpoint {str(source)!r} has no 'state_dict' of tensors; expected {OFFICIAL}")
    return dict(tensors)


def convert_file(source: str | Path, out: str | Path) -> None:
    """Write the Mask2Former folder ``out``; it appears only once it has been read back strictly.

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``, ``convert`` and ``read_detector`` do.
        FileExistsError: if ``out`` is there and not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(out)!r} is there already; choose a new folder")
    tensors = read_checkpoint(source)
    config, converted = config_of(tensors), convert(tensors)
    loss = torch.tensor([1.0] * config.num_labels + [config.no_object_weight])  # published files carry it
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        finished = Path(scratch) / "detector"
        config.save_pretrained(finished)
        save_file(converted | {"criterion.empty_weight": loss}, finished / "model.safetensors", {"format": "pt"})
        read_detector(str(finished))
        finished.rename(folder)


def main() -> None:
    """Entry point of ``flowopd convert``."""
    told = "Turn GenEval's official detector, a checkpoint of mmdet, into a Mask2Former folder that GenEval reads."
    reads = ArgumentParser(prog="flowopd convert", description=told, exit_on_error=False, allow_abbrev=False)
    reads.add_argument("--source", required=True, metavar="FILE", help=f"the checkpoint: {OFFICIAL}")
    reads.add_argument("--out", required=True, metavar="FOLDER", help="give it to GenEval as `detector`")
    words = reads.parse_args(sys.argv[2:])
    convert_file(words.source, words.out)
    print(f"wrote {words.out}; use it as GenEval(detector={words.out!r})")
