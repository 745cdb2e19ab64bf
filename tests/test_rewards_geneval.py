"""The GenEval reward: detector, colours, converter, and all together on tiny random weights in the published layout."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig
from transformers.models.mask2former import modeling_mask2former
from transformers.models.swin.modeling_swin import SwinPatchMerging

from flowopd.cli.main import main
from flowopd.prompts.geneval import COLOURS, OBJECTS, TAGS
from flowopd.records import Prompt
from flowopd.rewards import DetailedReward, GenEval, Reward, Scores, detailed
from flowopd.rewards.clip import cropped, shared_clip
from flowopd.rewards.geneval import Detection, select
from flowopd.rewards.geneval import detector as detectors
from flowopd.rewards.geneval.colours import ColorNamer, cut_out
from flowopd.rewards.geneval.convert import config_of, convert, convert_file
from flowopd.rewards.geneval.detector import Detector, instances, prepare, read_detector

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swin_small():
    """The architecture of facebook/mask2former-swin-small-coco-instance."""
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=STAGES)
    return Mask2FormerConfig(backbone_config=swin, num_labels=80)


def tiny_config(labels=80):
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES)
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    sizes |= {"encoder_layers": 2, "decoder_layers": 4, "num_attention_heads": 4, "num_queries": 9}
    sizes |= {"dim_feedforward": 24, "encoder_feedforward_dim": 16}
    return Mask2FormerConfig(backbone_config=swin, num_labels=labels, **sizes)


@pytest.fixture(scope="module")
def stock():
    """A random Mask2Former as transformers builds it."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # scipy, for a loss that is not run
        torch.manual_seed(0)
        network = Mask2FormerForUniversalSegmentation(tiny_config()).eval()
        for parameter in network.parameters():  # norms and biases too
            parameter.data += 0.2 * torch.randn_like(parameter)
        decoder = network.model.transformer_module
        for name, parameter in decoder.decoder.layers.named_parameters():
            parameter.data *= 0.1 if "out_proj" in name or "fc2" in name else 1
        decoder.queries_features.weight.data *= 8  # queries differ,
        network.class_predictor.weight.data *= 8  # and some are sure of what they see
        return network


@pytest.fixture(scope="module")
def published(stock, tmp_path_factory):
    """The same in the layout of the hub."""
    folder = tmp_path_factory.mktemp("detector")
    stock.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "swin.layernorm" not in name}
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


CLIP = {"embed_dim": 16}  # as published, without a word of QuickGELU
CLIP["vision_cfg"] = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
CLIP["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in open_clip's layout."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = open_clip.model.CLIP(**CLIP)
        save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture
def small(monkeypatch):
    """Images are resized to 64 px, not 800."""
    monkeypatch.setattr(detectors, "SHORT", 64)


# --------------------------------------------------------------------------------------------------- before the network


@pytest.mark.parametrize(
    ("original", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((256, 512), (667, 1333), (672, 1344)),  # 2.6035 times: 666.5 rounds up
        ((640, 480), (1067, 800), (1088, 800)),
        ((30, 20), (1200, 800), (1216, 800)),
    ],
)
def test_images_are_resized_and_padded_as_mmdet_does(original, resized, padded):
    pixels, size = prepare(torch.full((1, 3, *original), 200, dtype=torch.uint8))
    assert size == resized
    assert pixels.shape == (1, 3, *padded)
    white = (200 - torch.tensor(detectors.MEAN)) / torch.tensor(detectors.STD)
    torch.testing.assert_close(pixels[0, :, : size[0], : size[1]].mean((1, 2)), white, rtol=1e-4, atol=1e-4)
    assert not pixels[..., size[0] :, :].any()
    assert not pixels[..., size[1] :].any()


def test_sizes_and_statistics_are_those_of_the_class_not_of_the_hub():
    stock = Mask2FormerImageProcessor()
    assert (stock.size["shortest_edge"], stock.size["longest_edge"]) == (detectors.SHORT, detectors.LONG)
    assert stock.size_divisor == detectors.DIVISOR
    assert [255 * mean for mean in stock.image_mean] == pytest.approx(detectors.MEAN)
    assert [255 * std for std in stock.image_std] == pytest.approx(detectors.STD)


def test_square_images_are_prepared_as_transformers_does():
    images = torch.randint(0, 256, (2, 3, 400, 400), dtype=torch.uint8)
    expected = Mask2FormerImageProcessor()(list(images), return_tensors="pt").pixel_values
    ours, _ = prepare(images)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.01 / min(detectors.STD)  # one byte, where rounding differs


# ---------------------------------------------------------------------------------------------------- after the network


def one_hot(queries, classes, confidence=20.0):
    """Class logits that are sure of one class per query; -1 is nothing."""
    logits = torch.zeros(queries, 81)
    for query, label in enumerate(classes):
        logits[query, label] = confidence
    return logits


def rectangle(left, top, right, bottom, size=(64, 64), sure=1e4):
    """Mask logits, +sure inside, -sure outside."""
    logits = torch.full(size, -sure)
    logits[top:bottom, left:right] = sure
    return logits


def test_a_rectangle_is_found_exactly():
    masks = torch.stack([rectangle(4, 8, 20, 40), rectangle(0, 0, 64, 64), torch.full((64, 64), -1e4)])
    found = instances(one_hot(3, [OBJECTS.index("cat"), -1, OBJECTS.index("dog")]), masks, *[(64, 64)] * 3, least=0.3)
    cat, dog = sorted(found, key=lambda one: one.label)  # "nothing" is none of the 80
    assert (cat.label, cat.box) == ("cat", (4, 8, 20, 40))
    assert cat.score == pytest.approx(1, abs=1e-5)
    assert cat.mask.sum() == 16 * 32
    assert cat.mask[8:40, 4:20].all()
    assert (dog.box, dog.score) == ((0, 0, 0, 0), 0)  # empty


@pytest.mark.parametrize("level", [0.2, 0.5, 2.0])
def test_the_score_is_class_times_mask(level):
    logits = torch.zeros(1, 81)
    logits[0, 15], logits[0, 80] = 3.0, 2.0
    masks = torch.full((1, 32, 32), -0.1)
    masks[0, 3, 5:9] = level
    masks[0, 4, 5:9] = 1.0
    (best, *_) = instances(logits, masks, *[(32, 32)] * 3)
    sure = logits.softmax(-1)[0, 15] * torch.tensor([level, 1.0]).sigmoid().mean()
    assert best.label == "cat"
    assert best.score == pytest.approx(float(sure), rel=1e-5)
    assert best.box == (5, 3, 9, 5)


def test_masks_reach_the_pixels_of_the_image():
    """A quarter of the resolution: 64 × 96 of the network's 64 × 128 pixels are an image of 128 × 192."""
    masks = rectangle(4, 2, 12, 10, (16, 32))[None]
    (cat,) = instances(one_hot(1, [15]), masks, (64, 128), (64, 96), (128, 192), least=0.3)
    assert cat.mask.shape == (128, 192)
    for side, expected in zip(cat.box, (4 * 8, 2 * 8, 12 * 8, 10 * 8), strict=True):
        assert abs(side - expected) <= 1  # the bilinear edge


def test_one_query_may_be_found_as_two_classes_and_a_hundred_pairs_are_kept():
    logits = torch.zeros(1, 81)
    logits[0, [15, 16]] = 10.0
    masks = rectangle(4, 8, 20, 40)[None]
    assert {one.label for one in instances(logits, masks, *[(64, 64)] * 3, least=0.3)} == {"cat", "dog"}
    many = instances(torch.randn(9, 81), masks.expand(9, 64, 64), *[(64, 64)] * 3)
    assert len(many) == 100


def test_what_the_thresholds_drop_may_be_left_out_at_once():
    logits, masks = 3 * torch.randn(20, 81), torch.randn(20, 16, 16)
    everything = instances(logits, masks, *[(64, 64)] * 3)
    early = instances(logits, masks, *[(64, 64)] * 3, least=0.3)
    assert 0 < len(early) < len(everything)
    assert [one for one in everything if one.score > 0.3] == [one for one in early if one.score > 0.3]


def test_scores_agree_with_transformers():
    """Which post-processes at 384 px, so mask logits are given at that size."""
    classes, masks = 3 * torch.randn(1, 9, 81), 4 * torch.randn(1, 9, 384, 384)
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    stock = Mask2FormerImageProcessor().post_process_instance_segmentation(outputs, threshold=0.01)
    expected = sorted((segment["score"] for segment in stock[0]["segments_info"]), reverse=True)
    ours = sorted((one.score for one in instances(classes[0], masks[0], *[(384, 384)] * 3)), reverse=True)
    assert ours[: len(expected)] == pytest.approx(expected, abs=1e-5)


def test_boxes_hold_their_masks():
    masks = torch.rand(9, 20, 30) > 0.99
    masks[0] = False
    boxes = detectors._boxes(masks).tolist()
    for (left, top, right, bottom), mask in zip(boxes, masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
        assert [left, top, right, bottom] == [int(side) for side in expected]


# ---------------------------------------------------------------------------------------------------------- the network


def test_the_network_is_transformers_own(stock, published):
    ours, pixels = read_detector(published).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, (classes, masks) = stock(pixels), ours(pixels)
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=0)
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=0)


def test_the_detector_of_the_paper_has_69_million_parameters():
    with torch.device("meta"):
        network = Detector(swin_small())
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(68.7e6, rel=0.01)


def without(folder, target, name):
    """A copy of a detector's folder that lacks a tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_a_detector_that_is_none_is_refused_in_a_sentence(published, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' is without files that Detector can read .*hf download"):
        read_detector(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"^model 'facebook/mask2former-.*' is not a folder, the hub cannot be"):
        read_detector(detectors.META)
    partial = without(published, tmp_path / "partial", "class_predictor.bias")
    with pytest.raises(ValueError, match=r"does not hold the tensors .*: 1 missing, such as class_predictor\.bias"):
        read_detector(partial)


def test_a_detector_of_other_classes_is_refused(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    Mask2FormerForUniversalSegmentation(tiny_config(labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 3 classes; GenEval needs COCO's 80"):
        read_detector(str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- colours


PALETTE = {
    "red": (255, 0, 0),
    "orange": (255, 128, 0),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 180, 200),
    "brown": (100, 50, 0),
    "black": (2, 2, 2),
    "white": (255, 255, 255),
}


class ColorSense(nn.Module):
    """Stands in for CLIP: an image is its mean colour, a caption the colour that it names."""

    size = 8

    def __init__(self):
        super().__init__()
        self.captions = 0

    def images(self, pixels):
        mean, std = (torch.tensor(values) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        return nn.functional.normalize(pixels.mean((2, 3)) * std + mean, dim=-1)

    def texts(self, captions):
        self.captions += len(captions)
        words = [caption.removeprefix("a photo of a ").split()[0].removesuffix("-colored") for caption in captions]
        return nn.functional.normalize(torch.tensor([PALETTE[word] for word in words]).float(), dim=-1)


def painted(*colors):
    """Images with one 6 × 6 patch of each colour, and its detections."""
    images = torch.zeros(len(colors), 3, 20, 20, dtype=torch.uint8)
    objects = []
    for row, color in enumerate(colors):
        images[row, :, 4:10, 3:9] = torch.tensor(PALETTE[color]).view(3, 1, 1)
        mask = torch.zeros(20, 20, dtype=torch.bool)
        mask[4:10, 3:9] = True
        objects.append((row, Detection("vase", 0.9, (3, 4, 9, 10), mask)))
    return images, objects


HUES = [color for color in COLOURS if color not in ("black", "white")]  # the cosine does not see brightness


def test_the_nearest_caption_names_the_colour():
    namer = ColorNamer(ColorSense())
    images, objects = painted(*HUES)
    assert namer.names(images, objects) == HUES
    assert namer.names(images, objects * 20) == HUES * 20  # more than fit into one forward
    assert namer.names(images, []) == []


def test_captions_are_encoded_once_per_class():
    sense = ColorSense()
    namer = ColorNamer(sense)
    images, objects = painted("red", "blue")
    for _ in range(3):
        namer.names(images, objects)
    assert sense.captions == 30  # 10 colours in 3 sentences
    torch.testing.assert_close(namer.classes("vase").norm(dim=-1), torch.ones(10))


def test_an_object_is_cut_out_on_grey():
    images, ((row, detection),) = painted("red")
    mask = detection.mask.clone()
    mask[4, 3] = False
    ours = cut_out(images[row], Detection("vase", 0.9, (2, 4, 9, 11), mask))
    picture = Image.fromarray(images[row].permute(1, 2, 0).numpy())  # as GenEval does it
    grey = Image.new("RGB", picture.size, "#999")
    expected = Image.composite(picture, grey, Image.fromarray(mask.numpy())).crop((2, 4, 9, 11))
    assert torch.equal(ours.permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    assert ours[:, 3, 3].tolist() == [255, 0, 0]
    assert ours[:, 0, 1].tolist() == [0x99] * 3


def test_crops_are_read_as_open_clip_reads_pictures(clip_folder):
    """Short side to 32 px, the middle square, CLIP's mean and deviation: from bytes, within two of them."""
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")[2]
    image = torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)
    expected = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert (cropped(image[None], 32)[0] - expected).abs().max() < 2.01 / 255 / min(OPENAI_DATASET_STD)


def test_openai_s_clip_has_quick_gelu(clip_folder):
    clip = shared_clip(clip_folder)
    assert any(isinstance(module, QuickGELU) for module in clip.modules())
    assert not any(isinstance(module, nn.GELU) for module in clip.modules())
    images, objects = painted(*COLOURS)
    with torch.no_grad():
        together = ColorNamer(clip).names(images, objects)
        assert together == [ColorNamer(clip).names(images, [one])[0] for one in objects]


# ------------------------------------------------------------------------------------------------------------ converter


def as_mmdet(tensors, version=2):
    """Tensors of transformers under mmdet's names and in its layout: the converter's inverse, written the other way."""
    given, theirs = dict(tensors), {}
    rows = {  # prefix here, prefix there, and the parts that are only renamed
        "model.pixel_level_module.encoder": "backbone",
        "model.pixel_level_module.decoder": "panoptic_head.pixel_decoder",
        "model.transformer_module": "panoptic_head",
    }
    for name in sorted(given):
        if name == "criterion.empty_weight" or "relative_position_index" in name:
            continue
        prefix = next((old for old in rows if name.startswith(old)), "")
        rest = name.removeprefix(prefix).removeprefix(".")
        new, tensor = inverse(prefix, rest, given[name], version)
        theirs.setdefault(f"{rows.get(prefix, 'panoptic_head')}.{new}", []).append(tensor)
    return {
        name: torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])]) for name, parts in theirs.items()
    }


PIECES = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}
NORMS = {"self_attn_layer_norm": 0, "final_layer_norm": 1}
QUERY_NORMS = {"cross_attn_layer_norm": 0, "self_attn_layer_norm": 1, "final_layer_norm": 2}


def inverse(prefix, rest, tensor, version):
    """mmdet's name, and the tensor with its place among those that are stacked."""
    ffn = "ffns.0" if version == 2 else "ffn"
    words = rest.split(".")
    kind = words[-1]
    if prefix.endswith("encoder"):
        return inverse_swin(words, rest, tensor)
    if words[0] == "class_predictor":
        return f"cls_embed.{kind}", (0, tensor)
    if prefix.endswith("transformer_module") and words[:2] == ["decoder", "layers"]:
        layer = f"transformer_decoder.layers.{words[2]}"
        cross, own = ("attentions.0", "attentions.1") if version == 2 else ("cross_attn", "self_attn")
        if words[3] == "cross_attn":
            return f"{layer}.{cross}.attn." + ".".join(words[4:]), (0, tensor)
        if words[3] == "self_attn" and words[4] in PIECES:
            return f"{layer}.{own}.attn.in_proj_{kind}", (PIECES[words[4]], tensor)
        if words[3] == "self_attn":
            return f"{layer}.{own}.attn.out_proj.{kind}", (0, tensor)
        if words[3] in QUERY_NORMS:
            return f"{layer}.norms.{QUERY_NORMS[words[3]]}.{kind}", (0, tensor)
        return f"{layer}.{ffn}.layers." + {"fc1": "0.0", "fc2": "1"}[words[3]] + f".{kind}", (0, tensor)
    if prefix.endswith("transformer_module"):
        plain = {"queries_embedder": "query_embed", "queries_features": "query_feat", "level_embed": "level_embed"}
        if words[0] in plain:
            return f"{plain[words[0]]}.{kind}", (0, tensor)
        if words[1] == "layernorm":
            return f"transformer_decoder.post_norm.{kind}", (0, tensor)
        return f"mask_embed.{2 * int(words[3])}.{kind}", (0, tensor)
    if words[:2] == ["encoder", "layers"]:
        layer = f"encoder.layers.{words[2]}"
        if words[3] == "self_attn":
            own = "attentions.0" if version == 2 else "self_attn"
            return f"{layer}.{own}.{words[4]}.{kind}", (0, tensor)
        if words[3] in NORMS:
            return f"{layer}.norms.{NORMS[words[3]]}.{kind}", (0, tensor)
        return f"{layer}.{ffn}.layers." + {"fc1": "0.0", "fc2": "1"}[words[3]] + f".{kind}", (0, tensor)
    if words[0] == "level_embed":
        return "level_encoding.weight", (0, tensor)
    if words[0] == "mask_projection":
        return f"mask_feature.{kind}", (0, tensor)
    number, part = (words[1], words[2]) if words[0] == "input_projections" else ("0", words[1])
    block = {"input_projections": "input_convs", "adapter_1": "lateral_convs", "layer_1": "output_convs"}[words[0]]
    return f"{block}.{number}.{'gn' if part == '1' else 'conv'}.{kind}", (0, tensor)


def inverse_swin(words, rest, tensor):
    kind = words[-1]
    if words[0] == "embeddings":
        return rest.replace("embeddings.patch_embeddings", "patch_embed").replace(
            "embeddings.norm", "patch_embed.norm"
        ), (0, tensor)
    if words[0] == "hidden_states_norms":
        return f"norm{int(words[1][-1]) - 1}.{kind}", (0, tensor)
    if words[3] == "downsample" or words[2 + 1] == "downsample":
        channels = tensor.shape[-1] // 4
        corners = tensor.unflatten(-1, (4, channels))[..., [0, 2, 1, 3], :]  # rows before columns
        return f"stages.{words[2]}.downsample.{words[4]}.{kind}", (0, corners.transpose(-1, -2).flatten(-2))
    block, part = f"stages.{words[2]}.blocks.{words[4]}", ".".join(words[5:-1])
    if words[5] == "attention" and words[-2] in PIECES:
        return f"{block}.attn.w_msa.qkv.{kind}", (PIECES[words[-2]], tensor)
    if kind == "relative_position_bias_table":
        return f"{block}.attn.w_msa.{kind}", (0, tensor)
    name = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.w_msa.proj"}
    name |= {"intermediate.dense": "ffn.layers.0.0", "output.dense": "ffn.layers.1"}
    return f"{block}.{name[part]}.{kind}", (0, tensor)


def with_positions(tensors):
    """And mmdet's tables of window positions."""
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    return tensors | {name.replace("bias_table", "index"): torch.zeros(16, 16).long() for name in tables}


@pytest.fixture(scope="module")
def tiny_tensors(published):
    return load_file(f"{published}/model.safetensors")


@pytest.mark.parametrize("version", [2, 3])
def test_a_converted_detector_is_the_same_to_the_bit(tiny_tensors, version):
    back = convert(with_positions(as_mmdet(tiny_tensors, version)))
    assert back.keys() == tiny_tensors.keys() - {"criterion.empty_weight"}
    for name, tensor in back.items():
        assert torch.equal(tensor, tiny_tensors[name]), name


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_converted_checkpoint_gives_identical_outputs(stock, tiny_tensors, tmp_path, version, suffix):
    theirs = with_positions(as_mmdet(tiny_tensors, version))
    if suffix == "pth":
        torch.save({"meta": {"epoch": 50, "CLASSES": ("person",)}, "state_dict": theirs}, tmp_path / "mmdet.pth")
    else:
        save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "mmdet.safetensors")
    convert_file(tmp_path / f"mmdet.{suffix}", tmp_path / "new" / "detector")
    network, pixels = read_detector(str(tmp_path / "new" / "detector")).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, (classes, masks) = stock(pixels), network(pixels)
    assert torch.equal(classes, expected.class_queries_logits)
    assert torch.equal(masks, expected.masks_queries_logits)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["detector"]  # nothing is left beside it


def test_stock_transformers_reads_what_was_converted(tiny_tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    save_file({name: each.contiguous() for name, each in as_mmdet(tiny_tensors).items()}, tmp_path / "m.safetensors")
    convert_file(tmp_path / "m.safetensors", tmp_path / "out")
    _, report = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    never_run = {f"model.pixel_level_module.encoder.swin.layernorm.{kind}" for kind in ("weight", "bias")}
    assert report["missing_keys"] <= never_run  # of this network's own files as well
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def mmdet_swin_small():
    """Names and shapes of GenEval's own checkpoint, listed from its architecture."""
    shapes = {"backbone.patch_embed.projection.weight": (96, 3, 4, 4)}
    shapes |= vectors("backbone.patch_embed", {"projection.bias": 96, "norm.weight": 96, "norm.bias": 96})
    for i, (depth, heads) in enumerate(zip((2, 2, 18, 2), (3, 6, 12, 24), strict=True)):
        width = 96 * 2**i
        shapes |= vectors(f"backbone.norm{i}", {"weight": width, "bias": width})
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            shapes |= {f"{block}.attn.w_msa.relative_position_bias_table": (169, heads)}
            shapes |= {f"{block}.attn.w_msa.relative_position_index": (49, 49)}
            shapes |= linear(f"{block}.attn.w_msa.qkv", width, 3 * width) | linear(
                f"{block}.attn.w_msa.proj", width, width
            )
            shapes |= linear(f"{block}.ffn.layers.0.0", width, 4 * width) | linear(
                f"{block}.ffn.layers.1", 4 * width, width
            )
            shapes |= norms(block, ("norm1", "norm2"), width)
        if i < 3:
            shapes |= {f"backbone.stages.{i}.downsample.reduction.weight": (2 * width, 4 * width)}
            shapes |= norms(f"backbone.stages.{i}.downsample", ("norm",), 4 * width)
    pixels, queries = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    for i, width in enumerate((768, 384, 192)):
        shapes |= {
            f"{pixels}.input_convs.{i}.conv.weight": (256, width, 1, 1),
            f"{pixels}.input_convs.{i}.conv.bias": (256,),
        }
        shapes |= norms(f"{pixels}.input_convs.{i}", ("gn",), 256)
    for i in range(6):
        layer = f"{pixels}.encoder.layers.{i}"
        outputs = {"sampling_offsets": 192, "attention_weights": 96, "value_proj": 256, "output_proj": 256}
        for name, width in outputs.items():
            shapes |= linear(f"{layer}.attentions.0.{name}", 256, width)
        shapes |= linear(f"{layer}.ffns.0.layers.0.0", 256, 1024) | linear(f"{layer}.ffns.0.layers.1", 1024, 256)
        shapes |= norms(f"{layer}.norms", "01", 256)
    shapes |= {
        f"{pixels}.lateral_convs.0.conv.weight": (256, 96, 1, 1),
        f"{pixels}.output_convs.0.conv.weight": (256, 256, 3, 3),
    }
    shapes |= norms(pixels, ("lateral_convs.0.gn", "output_convs.0.gn"), 256)
    shapes |= {f"{pixels}.mask_feature.weight": (256, 256, 1, 1), f"{pixels}.mask_feature.bias": (256,)}
    shapes |= {f"{pixels}.level_encoding.weight": (3, 256), "panoptic_head.level_embed.weight": (3, 256)}
    for i in range(9):
        layer = f"{queries}.layers.{i}"
        for k in range(2):
            attention = f"{layer}.attentions.{k}.attn"
            shapes |= {f"{attention}.in_proj_weight": (768, 256), f"{attention}.in_proj_bias": (768,)}
            shapes |= linear(f"{attention}.out_proj", 256, 256)
        shapes |= linear(f"{layer}.ffns.0.layers.0.0", 256, 2048) | linear(f"{layer}.ffns.0.layers.1", 2048, 256)
        shapes |= norms(f"{layer}.norms", "012", 256)
    shapes |= norms(queries, ("post_norm",), 256)
    shapes |= {f"panoptic_head.{name}.weight": (100, 256) for name in ("query_embed", "query_feat")}
    shapes |= linear("panoptic_head.cls_embed", 256, 81)
    for i in (0, 2, 4):
        shapes |= linear(f"panoptic_head.mask_embed.{i}", 256, 256)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def vectors(prefix, sizes):
    return {f"{prefix}.{name}": (size,) for name, size in sizes.items()}


def linear(prefix, inputs, outputs):
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


def norms(prefix, names, width):
    return {f"{prefix}.{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def test_the_official_names_and_shapes_are_those_of_the_published_detector():
    theirs = mmdet_swin_small()
    config = config_of(theirs)
    assert architecture(config) == architecture(swin_small())
    assert [config.id2label[i] for i in range(80)] == list(OBJECTS)
    with torch.device("meta"):
        network = Detector(config)
    converted = convert(theirs)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(
        parameter.numel() for name, parameter in network.named_parameters() if "swin.layernorm" not in name
    )


def architecture(config):
    ours = config.to_dict()
    swin = ours.pop("backbone_config")
    for name in ("architectures", "id2label", "label2id", "dtype", "num_labels"):
        ours.pop(name, None)
    return ours, {
        name: swin[name] for name in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "out_features")
    }


def test_merged_patches_change_order(stock):
    """mmdet unfolds 2 × 2 patches channel by channel, transformers concatenates them corner by corner."""
    theirs = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16, bias=False))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    names = {"norm.weight": "0.weight", "norm.bias": "0.bias", "reduction.weight": "1.weight"}
    tensors = {f"backbone.stages.0.downsample.{ours}": theirs.state_dict()[name] for ours, name in names.items()}
    converted = {name.split("downsample.")[1]: tensor for name, tensor in convert(tensors).items()}
    ours = SwinPatchMerging(8)
    ours.load_state_dict(converted)
    x = torch.randn(2, 8, 6, 4)
    unfolded = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    torch.testing.assert_close(ours(x.flatten(2).transpose(1, 2), (6, 4)), theirs(unfolded))


def test_a_checkpoint_must_fit_both_ways(tiny_tensors, tmp_path):
    theirs = as_mmdet(tiny_tensors)
    with pytest.raises(ValueError, match=r"^1 of \d+ tensors are not those of mmdet's .* such as bbox_head.fc.weight;"):
        convert(theirs | {"bbox_head.fc.weight": torch.zeros(1)})
    lacking = {name: tensor.contiguous() for name, tensor in theirs.items() if not name.endswith("mask_embed.2.bias")}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"1 missing, such as model.transformer_module.*mask_embedder.1.0.bias"):
        convert_file(tmp_path / "lacking.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match=r"no tensor 'panoptic_head.cls_embed.bias'; expected GenEval's detector, https:"
    ):
        config_of({name: tensor for name, tensor in theirs.items() if "cls_embed" not in name})


def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint 'absent\.pth'; download GenEval's detector from https://"
    ):
        convert_file("absent.pth", tmp_path / "out")
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth cannot be read \(UnpicklingError\)"):
        convert_file(tmp_path / "module.pth", tmp_path / "out")
    torch.save({"epoch": 3}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="has no 'state_dict' of tensors"):
        convert_file(tmp_path / "plain.pth", tmp_path / "out")


def test_the_verb_converts_and_refuses(tiny_tensors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": as_mmdet(tiny_tensors)}, "mmdet.pth")
    words = ["flowopd", "convert", "--source", "mmdet.pth", "--out", "detector"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert "wrote detector; use it as GenEval(detector='detector')" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert capsys.readouterr().err == "flowopd: error: 'detector' is there already; choose a new folder\n"
    monkeypatch.setattr(sys, "argv", words[:-2])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert capsys.readouterr().err == "flowopd: error: the command needs --out\n"


# --------------------------------------------------------------------------------------------------------- all together


def prompts():
    """One of each tag, about objects that random weights happen to find, and others."""
    entries = [
        ("single_object", [{"class": "bench", "count": 1}]),
        ("two_object", [{"class": "cat", "count": 1}, {"class": "tie", "count": 1}]),
        ("counting", [{"class": "cup", "count": 3}]),
        ("colors", [{"class": "car", "count": 1, "color": "red"}]),
        ("position", [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]),
        ("color_attr", [{"class": name, "count": 1, "color": "blue"} for name in ("bed", "bowl")]),
    ]
    return [Prompt(tag, "geneval", {"tag": tag, "include": include}) for tag, include in entries]


@pytest.fixture
def reward(published, clip_folder, small):
    return GenEval(published, clip=clip_folder, batch_size=4)


@pytest.fixture
def images():
    """Flat pictures with one square each."""
    images = torch.randint(0, 256, (6, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 64, 64)
    for row in range(6):
        images[row, :, 8 * row : 8 * row + 20, 30:50] = torch.randint(0, 256, (3, 1, 1), dtype=torch.uint8)
    return images


def about(reward, images):
    """Prompts that ask, for each image, for what the detector finds there."""
    reward.load()
    with torch.no_grad():
        everything = [select(found, tag) for tag, found in zip(TAGS, reward._detector.detect(images), strict=True)]
    asked = []
    for tag, found in zip(TAGS, everything, strict=True):
        color = {"color": "red"} if "color" in tag else {}
        include = [{"class": label, "count": len(group)} | color for label, group in found.items()]
        asked.append(Prompt(tag, "geneval", {"tag": tag, "include": include or [{"class": "cat", "count": 1}]}))
    return asked


def test_geneval_is_a_detailed_reward(reward, images):
    assert isinstance(reward, Reward)
    assert isinstance(reward, DetailedReward)
    scores = detailed(reward, images, prompts())
    assert isinstance(scores, Scores)
    assert list(scores.parts) == ["correct", "strict", "partial", *TAGS]
    for each in (scores.value, *scores.parts.values()):
        assert each.shape == (6,)
        assert each.dtype == torch.float32
    assert torch.equal(scores.value, scores.parts["partial"])
    assert torch.equal(reward.score(images, prompts()), scores.value)
    own = torch.stack([scores.parts[tag] for tag in TAGS])
    assert torch.equal(own.diagonal(), scores.parts["correct"])
    assert own.isnan().sum() == 30


def test_what_is_found_is_judged_right(reward, images):
    asked = about(reward, images)
    scores = reward.detail(images, asked)
    words = {entry["class"] for prompt in asked for entry in prompt.metadata["include"]}
    assert len(words) > 3  # the random weights find something
    plain = [i for i, tag in enumerate(TAGS) if tag in ("single_object", "two_object", "position")]
    assert scores.parts["correct"][plain].all()
    assert scores.parts["strict"][plain].all()
    assert (scores.parts["partial"] >= scores.parts["strict"]).all()


class Sees:
    """A detector that knows what is there."""

    def __init__(self, *found):
        self.found = found

    def detect(self, images):
        return [list(each) for each in self.found]


def test_objects_colours_and_places_come_together():
    """A red vase left of a blue clock: asked for rightly, with colours exchanged, and misplaced."""
    images, ((_, red), (_, blue)) = painted("red", "blue")
    picture = torch.cat([images[0], images[1]], -1).repeat(3, 1, 1, 1)
    vase = Detection("vase", 0.9, red.box, nn.functional.pad(red.mask, (0, 20)))
    clock = Detection("clock", 0.8, (23, 4, 29, 10), nn.functional.pad(blue.mask, (20, 0)))
    reward = GenEval()
    reward._detector, reward._namer, reward._loaded = Sees(*[(vase, clock)] * 3), ColorNamer(ColorSense()), True
    reward.networks = lambda: []

    def asked(tag, first, second, position):
        include = [{"class": "vase", "count": 1, "color": first}, {"class": "clock", "count": 1, "color": second}]
        include[1]["position"] = [position, 0]
        return Prompt("two things", "geneval", {"tag": tag, "include": include})

    prompts = [
        asked("color_attr", "red", "blue", "right of"),
        asked("color_attr", "blue", "red", "right of"),
        asked("position", "red", "blue", "above"),
    ]
    scores = reward.detail(picture, prompts)
    assert scores.parts["correct"].tolist() == scores.parts["strict"].tolist() == [1, 0, 0]
    assert scores.value.tolist() == pytest.approx([1, 2 / 4, 4 / 5])
    assert scores.parts["color_attr"].nan_to_num(9).tolist() == [1, 0, 9]
    reward.compat = "flow_grpo"
    assert reward.score(picture, prompts).tolist() == pytest.approx([1, 2 / 4, 5 / 6])


@pytest.mark.parametrize("verdict", ["correct", "strict", "partial"])
def test_the_verdict_is_the_score(published, clip_folder, small, images, verdict):
    reward = GenEval(published, clip=clip_folder, verdict=verdict)
    scores = reward.detail(images, about(reward, images))
    assert torch.equal(scores.value, scores.parts[verdict])


def test_batched_equals_one_by_one(reward, images):
    asked = about(reward, images)
    together = reward.detail(images, asked)
    alone = Scores.cat([reward.detail(images[i : i + 1], asked[i : i + 1]) for i in range(6)])
    for name, part in together.parts.items():
        torch.testing.assert_close(part, alone.parts[name], equal_nan=True)


def test_bytes_and_floats_agree(reward, images):
    asked = about(reward, images)
    assert torch.equal(reward.score(images, asked), reward.score(images.float() / 255, asked))


def test_half_precision_is_near(published, clip_folder, small, images, reward):
    half = GenEval(published, clip=clip_folder, dtype="bfloat16")
    half.load()
    reward.load()
    assert {each.dtype for each in half._detector.parameters()} == {torch.bfloat16}
    pixels, _ = prepare(images)
    with torch.no_grad():
        rough, exact = half._detector(pixels.bfloat16())[0].float(), reward._detector(pixels)[0]
    assert (rough - exact).norm() < 0.05 * exact.norm()
    assert half.score(images, prompts()).dtype == torch.float32


def test_weights_leave_the_accelerator_between_uses(published, clip_folder, small, images):
    reward = GenEval(published, clip=clip_folder, offload=True)
    assert torch.equal(reward.score(images, prompts()), reward.score(images, prompts()))
    assert {each.device.type for network in reward.networks() for each in network.parameters()} == {"cpu"}
    assert not any(each.requires_grad for network in reward.networks() for each in network.parameters())


def test_a_bad_prompt_speaks_before_weights_are_read(images):
    reward = GenEval("nowhere", clip="nowhere")
    with pytest.raises(ValueError, match=r"^prompt 'a cat' has no GenEval metadata, only \[\]"):
        reward.score(images[:1], [Prompt("a cat", "geneval")])
    with pytest.raises(FileNotFoundError, match=r"^model 'nowhere' is not a folder, .*`flowopd convert` makes"):
        reward.score(images[:1], prompts()[:1])


def test_missing_clip_weights_say_where_they_are(published, tmp_path, images):
    reward = GenEval(published, clip=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config\.json; `hf download timm/vit_large_patch14"):
        reward.score(images[:1], prompts()[:1])


def test_bad_input_is_one_sentence(reward, images):
    with pytest.raises(ValueError, match="verdict is 'right'; expected one of correct, strict, partial"):
        GenEval(verdict="right")
    with pytest.raises(ValueError, match="expected one prompt per image"):
        reward.score(images, prompts()[:2])
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\)"):
        reward.score(images[0], prompts())
