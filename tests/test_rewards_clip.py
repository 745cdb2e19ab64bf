"""PickScore, HPS-v2.1, CLIPScore, Aesthetic and ImageReward, on tiny random weights in the published files.

What they must give is written here once more, from the published tensors by name, in plain torch.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import open_clip
import pytest
import torch
from jsonargparse import ArgumentParser
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import clip_tokenizer
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor
from transformers import BertTokenizerFast, CLIPConfig, CLIPImageProcessor, CLIPModel

from flowopd.records import Prompt
from flowopd.rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, Reward, Scores
from flowopd.rewards.clip import OPENAI_L14, cropped, padded, shared_clip
from flowopd.rewards.model import ModelReward, linear_head

SIDE = 28  # pixels that the tiny CLIPs read; BLIP reads 32
VISION = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TINY = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_LAYERS = (0, 2, 4, 6, 7)  # the published numbers; between them are dropouts
PROMPTS = [Prompt(text, "any") for text in ("a red cube", "two dogs, one cat and a very long tail", "", "x")]

# ---------------------------------------------------------------------------------------------------- published files


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of all five rewards, as `hf download` leaves them."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("pickscore", "clip", "hps", "aesthetic", "image_reward"):
            (folder / name).mkdir()
            WRITERS[name](folder / name)
    return folder


def write_pickscore(folder):
    words = clip_tokenizer()
    words.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 77, "eos_token_id": 2}  # 2 is what is published
    vision = {"image_size": SIDE, "patch_size": 14}
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)


def write_clip(folder, quick_gelu=True):
    network = open_clip.model.CLIP(**TINY, quick_gelu=quick_gelu)
    config = {"model_cfg": {**TINY, "quick_gelu": quick_gelu}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")


def write_hps(folder):
    (folder / "tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-hps.json")  # a name beside ViT-H-14
    torch.save({"state_dict": open_clip.model.CLIP(**TINY).state_dict()}, folder / "HPS_v2.1_compressed.pt")


def write_aesthetic(folder):
    torch.save(head(TINY["embed_dim"]), folder / HEAD)


def head(width):
    """Published names of the five layers."""
    widths = (width, 12, 8, 6, 4, 1)
    shapes = {}
    for number, (before, after) in zip(HEAD_LAYERS, pairwise(widths), strict=True):
        shapes |= {f"layers.{number}.weight": (after, before), f"layers.{number}.bias": (after,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
WIDTH, PATCH, DEPTH = 128, 16, 2  # of BLIP's vision transformer; attention heads are 64 wide
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz,",
    *map("##".__add__, "abcdefghijklmnopqrstuvwxyz"),
]


def write_image_reward(folder):
    words = {word: number for number, word in enumerate(WORDS)}
    BertTokenizerFast(vocab=words).save_pretrained(folder)
    config = {**BERT, "vocab_size": len(WORDS), "encoder_width": 768, "add_cross_attention": True}
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.save(image_reward_tensors(), folder / "ImageReward.pt")


def image_reward_tensors():
    """Published names and shapes, what is never used included."""
    names = blip_vision_shapes() | blip_text_shapes()
    names |= {"vision_proj.weight": (5, WIDTH), "vision_proj.bias": (5,), "text_proj.weight": (5, 16)}
    tensors = {f"blip.{name}": 0.2 * torch.randn(shape) for name, shape in names.items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return tensors | {f"mlp.{name}": tensor for name, tensor in head(16).items()}


def blip_vision_shapes():
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    }
    shapes |= {"patch_embed.proj.bias": (WIDTH,), **both("norm", WIDTH)}
    for i in range(DEPTH):
        block = {**both("norm1", WIDTH), **both("attn.qkv", 3 * WIDTH, WIDTH), **both("attn.proj", WIDTH, WIDTH)}
        block |= {**both("norm2", WIDTH), **both("mlp.fc1", 64, WIDTH), **both("mlp.fc2", WIDTH, 64)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()}


def blip_text_shapes():
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), 16), "embeddings.position_embeddings.weight": (64, 16)}
    shapes |= both("embeddings.LayerNorm", 16)
    for i in range(BERT["num_hidden_layers"]):
        block = {**both("intermediate.dense", 32, 16), **both("output.dense", 16, 32), **both("output.LayerNorm", 16)}
        for kind, width in (("attention", 16), ("crossattention", WIDTH)):
            block |= {**both(f"{kind}.self.query", 16, 16), **both(f"{kind}.self.key", 16, width)}
            block |= {**both(f"{kind}.self.value", 16, width), **both(f"{kind}.output.dense", 16, 16)}
            block |= both(f"{kind}.output.LayerNorm", 16)
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in block.items()}
    return {f"text_encoder.{name}": shape for name, shape in shapes.items()}


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


WRITERS = {
    "pickscore": write_pickscore,
    "clip": write_clip,
    "hps": write_hps,
    "aesthetic": write_aesthetic,
    "image_reward": write_image_reward,
}

# ------------------------------------------------------------------------------------------ the rewards, and the truth

NAMES = ["PickScore", "HPSv2", "CLIPScore", "Aesthetic", "ImageReward"]
every_reward = pytest.mark.parametrize("name", NAMES)


def build(name, weights, **options):
    """A reward through its public constructor."""
    clip = str(weights / "clip")
    made = {
        "PickScore": partial(PickScore, str(weights / "pickscore"), tokenizer=str(weights / "pickscore")),
        "HPSv2": partial(HPSv2, str(weights / "hps"), architecture="tiny-hps"),
        "CLIPScore": partial(CLIPScore, clip),
        "Aesthetic": partial(Aesthetic, str(weights / "aesthetic"), clip=clip),
        "ImageReward": partial(ImageReward, str(weights / "image_reward"), tokenizer=str(weights / "image_reward")),
    }
    return made[name](**options)


def pictures(side=SIDE, count=4, width=None):
    """Smooth random bytes."""
    small = torch.rand(count, 3, 6, 6)
    large = torch.nn.functional.interpolate(small, (side, width or side), mode="bicubic", align_corners=False)
    return (255 * large.clamp(0, 1)).round().to(torch.uint8)


def standard(images):
    mean, std = (torch.tensor(stats)[:, None, None] for stats in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (images / 255 - mean) / std


def attend(query, key, value, heads, mask=0.0):
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    odds = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
    return (odds.softmax(-1) @ value).transpose(1, 2).flatten(2)


def norm(x, t, name, eps=1e-5):
    return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def dense(x, t, name):
    return linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def patches(pixels, weight, bias=None):
    """A convolution whose stride is its kernel, as a matrix product."""
    side = weight.shape[-1]
    cut = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return linear(cut, weight.flatten(1), bias)


def clip_block(x, t, name, heads, act, mask=0.0):
    seen = norm(x, t, f"{name}.ln_1")
    qkv = linear(seen, t[f"{name}.attn.in_proj_weight"], t[f"{name}.attn.in_proj_bias"]).chunk(3, -1)
    x = x + dense(attend(*qkv, heads, mask), t, f"{name}.attn.out_proj")
    return x + dense(act(dense(norm(x, t, f"{name}.ln_2"), t, f"{name}.mlp.c_fc")), t, f"{name}.mlp.c_proj")


def clip_image(t, images, act):
    cells = patches(standard(images), t["visual.conv1.weight"])
    x = torch.cat([t["visual.class_embedding"].expand(len(cells), 1, -1), cells], 1) + t["visual.positional_embedding"]
    x = norm(x, t, "visual.ln_pre")
    for i in range(VISION["layers"]):
        x = clip_block(x, t, f"visual.transformer.resblocks.{i}", 2, act)
    return norm(x[:, 0], t, "visual.ln_post") @ t["visual.proj"]


def clip_text(t, prompts, act):
    tokens = open_clip.tokenize([prompt.text for prompt in prompts])
    x = t["token_embedding.weight"][tokens] + t["positional_embedding"]
    future = torch.full((77, 77), -torch.inf).triu(1)
    for i in range(TEXT["layers"]):
        x = clip_block(x, t, f"transformer.resblocks.{i}", TEXT["heads"], act, future)
    return norm(x, t, "ln_final")[range(len(tokens)), tokens.argmax(-1)] @ t["text_projection"]


def quick(x):
    return x * torch.sigmoid(1.702 * x)


def true_pickscore(weights, images, prompts):
    """The stock classes of transformers."""
    model, words = CLIPModel.from_pretrained(weights / "pickscore").eval(), clip_tokenizer()
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    inputs = words([p.text for p in prompts], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pixels = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
    paper = model(**inputs, **pixels).logits_per_image.diagonal()
    return paper / 26, paper


def true_hps(weights, images, prompts):
    t = torch.load(weights / "hps" / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    cosine = cosine_similarity(clip_image(t, images, gelu), clip_text(t, prompts, gelu))
    return cosine, cosine


def true_clipscore(weights, images, prompts):
    t = load_file(weights / "clip" / "open_clip_model.safetensors")
    cosine = cosine_similarity(clip_image(t, images, quick), clip_text(t, prompts, quick))
    return 100 * cosine / 30, 100 * cosine


def true_aesthetic(weights, images, prompts):
    t = load_file(weights / "clip" / "open_clip_model.safetensors")
    x = clip_image(t, images, quick)
    x = x / x.norm(dim=-1, keepdim=True)
    layers = torch.load(weights / "aesthetic" / HEAD, weights_only=True)
    for number in HEAD_LAYERS:
        x = dense(x, layers, f"layers.{number}")
    return x[:, 0], x[:, 0]


def true_image_reward(weights, images, prompts):
    t = torch.load(weights / "image_reward" / "ImageReward.pt", weights_only=True)
    words = BertTokenizerFast.from_pretrained(weights / "image_reward")
    inputs = words([p.text for p in prompts], padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    x = blip_text(t, inputs.input_ids, inputs.attention_mask, blip_image(t, images))[:, 0]
    for number in HEAD_LAYERS:
        x = dense(x, t, f"mlp.layers.{number}")
    score = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    return score, score


def blip_image(t, images):
    t = {name.removeprefix("blip.visual_encoder."): tensor for name, tensor in t.items()}
    cells = patches(standard(images), t["patch_embed.proj.weight"], t["patch_embed.proj.bias"])
    x = torch.cat([t["cls_token"].expand(len(cells), -1, -1), cells], 1) + t["pos_embed"]
    for i in range(DEPTH):
        qkv = dense(norm(x, t, f"blocks.{i}.norm1", 1e-6), t, f"blocks.{i}.attn.qkv").chunk(3, -1)
        x = x + dense(attend(*qkv, WIDTH // 64), t, f"blocks.{i}.attn.proj")
        hidden = gelu(dense(norm(x, t, f"blocks.{i}.norm2", 1e-6), t, f"blocks.{i}.mlp.fc1"))
        x = x + dense(hidden, t, f"blocks.{i}.mlp.fc2")
    return norm(x, t, "norm", 1e-6)


def blip_text(t, tokens, mask, seen):
    t = {name.removeprefix("blip.text_encoder."): tensor for name, tensor in t.items()}
    x = t["embeddings.word_embeddings.weight"][tokens] + t["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x, t, "embeddings.LayerNorm", 1e-12)
    padding = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
    for i in range(BERT["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, padding), ("crossattention", seen, 0.0)):
            name = f"{layer}.{kind}"
            source = x if source is None else source
            qkv = (dense(what, t, f"{name}.self.{part}") for what, part in zip((x, source, source), PARTS, strict=True))
            x = norm(
                x + dense(attend(*qkv, 2, hidden), t, f"{name}.output.dense"), t, f"{name}.output.LayerNorm", 1e-12
            )
        hidden = dense(gelu(dense(x, t, f"{layer}.intermediate.dense")), t, f"{layer}.output.dense")
        x = norm(x + hidden, t, f"{layer}.output.LayerNorm", 1e-12)
    return x


PARTS = ("query", "key", "value")
TRUTHS = {
    "PickScore": true_pickscore,
    "HPSv2": true_hps,
    "CLIPScore": true_clipscore,
    "Aesthetic": true_aesthetic,
    "ImageReward": true_image_reward,
}

# ------------------------------------------------------------------------------------------------------------ the laws


@every_reward
@torch.no_grad()
def test_the_score_is_the_published_formula(name, weights):
    images = pictures(32 if name == "ImageReward" else SIDE)  # what the network reads, so that nothing is resized
    value, paper = TRUTHS[name](weights, images, PROMPTS)
    scores = build(name, weights).detail(images, PROMPTS)
    assert value.std() > 1e-4, "the weights make no difference"
    torch.testing.assert_close(scores.value, value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.parts["paper"], paper, atol=1e-4, rtol=1e-4)


@every_reward
def test_scores_are_one_float_per_image(name, weights):
    reward = build(name, weights)
    scores = reward.score(pictures(40), PROMPTS)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert not scores.requires_grad
    assert reward.score(pictures(count=0), []).shape == (0,)


@every_reward
def test_a_batch_scores_as_its_images_one_by_one(name, weights):
    images = pictures(40)
    together = build(name, weights).score(images, PROMPTS)
    by_three = build(name, weights, batch_size=3).score(images, PROMPTS)
    alone = [build(name, weights).score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together)
    torch.testing.assert_close(by_three, together)


@every_reward
def test_bytes_and_floats_score_alike(name, weights):
    images, reward = pictures(40), build(name, weights)
    assert torch.equal(reward.score(images / 255, PROMPTS), reward.score(images, PROMPTS))


@every_reward
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(name, dtype, weights):
    images = pictures(40)
    exact, near = (build(name, weights, dtype=kind).detail(images, PROMPTS) for kind in ("float32", dtype))
    assert near.value.dtype == torch.float32
    assert not torch.equal(near.value, exact.value)
    part = 2**-4 if dtype == "bfloat16" else 2**-7  # of the spread that one network can give
    assert (near.value - exact.value).abs().max() < part * max(1.0, exact.value.abs().max())


@every_reward
@pytest.mark.parametrize("size", [(1, 1), (9, 60), (61, 24), (28, 28), (100, 100)])
def test_images_of_any_size_are_scored(name, size, weights):
    assert build(name, weights).score(pictures(size[0], 2, size[1]), PROMPTS[:2]).isfinite().all()


@every_reward
def test_images_matter_and_prompts_where_they_should(name, weights):
    images, reward = pictures(count=1).expand(4, -1, -1, -1), build(name, weights)
    scores = reward.score(images, PROMPTS)
    assert (scores.std() > 1e-5) == (name != "Aesthetic")
    assert reward.score(pictures(), PROMPTS[:1] * 4).std() > 1e-4


@every_reward
def test_long_prompts_are_cut(name, weights):
    words = "red cube and blue ball " * 40
    scores = build(name, weights).score(
        pictures(count=1).expand(2, -1, -1, -1), [Prompt(words, "t"), Prompt(words + "x", "t")]
    )
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (50, 80), (81, 33)])
def test_pixels_are_those_of_the_published_transform_within_a_level(size):
    images = pictures(*size[:1], 2, size[1])
    crop = [Resize(SIDE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor()]
    stock = Compose([*crop, Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)])
    expected = torch.stack([stock(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    levels = (cropped(images, SIDE) - expected) * 255 * torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    assert levels.abs().max() < 1.01
    assert levels.abs().mean() < 0.1


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_clipscore_resizes_as_it_says(resize, weights):
    """Bilinearly as Flow-GRPO's scorer, which resizes floats; here they are bytes, two levels apart at most."""
    images = pictures(64, 2, 48)
    small = Compose([Resize(SIDE, InterpolationMode(resize)), CenterCrop(SIDE)])(images / 255)
    assert (cropped(images, SIDE, resize) - standard(255 * small)).abs().max() * min(OPENAI_DATASET_STD) < 2 / 255
    scores = build("CLIPScore", weights, resize=resize).score(images, PROMPTS[:2])
    torch.testing.assert_close(scores, true_clipscore(weights, 255 * small, PROMPTS[:2])[0], atol=2e-3, rtol=0)


def test_a_padded_image_is_whole_and_centred_on_black():
    images = pictures(20, 2, 40)
    pixels = padded(images, SIDE)
    resized = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 14), Image.Resampling.BICUBIC) for image in images
    ]
    expected = torch.zeros(2, 3, SIDE, SIDE)
    expected[:, :, 7:21] = torch.stack([PILToTensor()(image) for image in resized]).float()
    levels = (pixels - standard(expected)) * 255 * torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    assert levels.abs().max() < 1.01
    assert torch.equal(padded(images[..., :20], SIDE), cropped(images[..., :20], SIDE))


def test_linear_layers_in_a_row_are_one_affine_map():
    layers = linear_head(head(24))
    assert [type(layer) for layer in layers] == [torch.nn.Linear] * 5
    x, y = torch.randn(2, 5, 24)
    torch.testing.assert_close(layers(0.3 * x + 0.7 * y), 0.3 * layers(x) + 0.7 * layers(y), atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- sharing and loading


def test_rewards_share_one_clip(weights):
    rewards = [build("CLIPScore", weights), build("Aesthetic", weights), build("CLIPScore", weights, offload=True)]
    for reward in rewards:
        reward.load()
    (clip,) = {next(iter(reward.networks())) for reward in rewards}
    assert clip is shared_clip(str(weights / "clip"))
    assert clip is not shared_clip(str(weights / "clip"), dtype="bfloat16")
    assert clip is not shared_clip(str(weights / "clip"), revision="other")


def test_a_shared_clip_leaves_memory_with_its_last_reward(weights):
    from flowopd.rewards.clip import _SHARED

    key = (str(weights / "clip"), "a revision of its own", "float32")
    reward = CLIPScore(key[0], clip_revision=key[1])
    reward.load()
    assert key in _SHARED
    del reward
    assert key not in _SHARED


@torch.no_grad()
def test_openais_clip_gets_its_quick_gelu_whatever_its_config_says(tmp_path):
    write_clip(tmp_path, quick_gelu=False)
    images, clip = pictures(), shared_clip(str(tmp_path))
    truth = clip_image(load_file(tmp_path / "open_clip_model.safetensors"), images, quick)
    torch.testing.assert_close(clip.network.encode_image(cropped(images, SIDE)), truth, atol=1e-5, rtol=1e-4)


def test_the_default_clip_is_what_open_clip_calls_openais():
    assert open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")["hf_hub"] == f"{OPENAI_L14}/"


def test_hps_is_a_whole_vit_h_14():
    with torch.device("meta"):
        network = open_clip.model.CLIP(**open_clip.get_model_config(HPSv2().architecture))
    assert len(network.state_dict()) == 686
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 986


@every_reward
def test_nothing_is_read_before_the_first_use(name, tmp_path):
    build(name, tmp_path)


@every_reward
def test_weights_are_read_once_and_frozen(name, weights):
    reward = build(name, weights)
    reward.score(pictures(), PROMPTS)
    before = list(reward.networks())
    reward.score(pictures(), PROMPTS)
    assert all(network is same for network, same in zip(before, reward.networks(), strict=True))
    assert not any(p.requires_grad for network in before for p in network.parameters())
    assert not any(network.training for network in before)


@every_reward
@pytest.mark.parametrize("offload", [True, False])
def test_offload_brings_the_weights_back_to_the_cpu(name, offload, weights, monkeypatch):
    moves, load = [], ModelReward.load
    monkeypatch.setattr(ModelReward, "load", lambda self, device="cpu": (moves.append(str(device)), load(self, device)))
    reward = build(name, weights, offload=offload)
    reward.score(pictures(), PROMPTS)
    assert moves == ["cpu", "cpu"][: 1 + offload]
    assert {p.device.type for network in reward.networks() for p in network.parameters()} == {"cpu"}


@every_reward
def test_a_reward_goes_where_it_is_sent(name, weights):
    """Every tensor of it: nothing is left behind on the CPU."""
    alone = {"clip_revision": "not shared with other tests"} if name in ("CLIPScore", "Aesthetic") else {}
    reward = build(name, weights, **alone)
    reward.load("meta")
    kept = [tensor for network in reward.networks() for tensor in (*network.parameters(), *network.buffers())]
    assert kept
    assert {tensor.device.type for tensor in kept} == {"meta"}


def test_a_failure_leaves_the_weights_on_the_cpu_too(weights, monkeypatch):
    reward = build("HPSv2", weights, offload=True)
    moves = []
    monkeypatch.setattr(reward, "load", lambda device="cpu": moves.append(str(device)))
    with pytest.raises(AttributeError):
        reward.score(pictures(), PROMPTS)  # nothing was read
    assert moves == ["cpu", "cpu"]


class Slow(ModelReward):
    """Notes when it begins and ends."""

    def __init__(self, diary):
        super().__init__()
        self.diary = diary

    def read(self): ...

    def networks(self):
        return []

    def forward(self, images, prompts):
        self.diary.append("begin")
        time.sleep(0.01)
        self.diary.append("end")
        return Scores(torch.zeros(len(images)))


def test_rewards_in_threads_take_turns():
    diary = []
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(Slow(diary).score, pictures(), PROMPTS) for _ in range(4)]
    assert [len(job.result()) for job in jobs] == [4] * 4
    assert diary == ["begin", "end"] * 4


# -------------------------------------------------------------------------------------------------- errors and configs


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@every_reward
@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(4, 28, 28), "expected images of shape (B, 3, H, W), got (4, 28, 28)"),
        (torch.zeros(4, 1, 28, 28), "expected images of shape (B, 3, H, W), got (4, 1, 28, 28)"),
        (torch.zeros(3, 3, 28, 28), "expected one prompt per image, got 3 images and 4 prompts"),
        (torch.zeros(4, 3, 28, 28, dtype=torch.long), "expected images of dtype uint8, or float in [0, 1]"),
        (torch.full((4, 3, 28, 28), 255.0), "expected images in [0, 1], got [255, 255]"),
        (["a.png"] * 4, "expected images as a tensor of shape (B, 3, H, W), got list"),
    ],
    ids=["no channels", "grey", "a prompt too many", "integers", "range", "no tensor"],
)
def test_bad_images_are_refused_before_anything_is_read(name, images, says, tmp_path):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        build(name, tmp_path).score(images, PROMPTS)
    sentence(error)


@every_reward
@pytest.mark.parametrize("where", ["an empty folder", "the hub, offline"])
def test_missing_weights_are_told_with_where_to_get_them(name, where, tmp_path):
    for folder in ("pickscore", "hps", "clip", "aesthetic", "image_reward"):
        (tmp_path / folder).mkdir()
    kinds = {"PickScore": PickScore, "HPSv2": HPSv2, "CLIPScore": CLIPScore}
    kinds |= {"Aesthetic": Aesthetic, "ImageReward": ImageReward}
    reward = build(name, tmp_path) if where == "an empty folder" else kinds[name]()
    with pytest.raises(FileNotFoundError) as error:
        reward.score(pictures(), PROMPTS)
    assert ("https://github.com/" if name == "Aesthetic" else "`hf download ") in sentence(error)


def copied(weights, folder, *names):
    for name in names:
        (folder / name).mkdir()
        for file in (weights / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("HPSv2", "hps/HPS_v2.1_compressed.pt"),
        ("CLIPScore", "clip/open_clip_model.safetensors"),
        ("Aesthetic", f"aesthetic/{HEAD}"),
        ("ImageReward", "image_reward/ImageReward.pt"),
        ("PickScore", "pickscore/model.safetensors"),
    ],
)
def test_a_file_that_is_cut_short_is_told(name, file, weights, tmp_path):
    copied(weights, tmp_path, "pickscore", "hps", "clip", "aesthetic", "image_reward")
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        build(name, tmp_path).load()
    assert str(tmp_path) in sentence(error)


def test_a_tensor_that_is_missing_is_told(weights, tmp_path):
    copied(weights, tmp_path, "hps", "image_reward", "pickscore", "aesthetic")
    change(tmp_path / "hps" / "HPS_v2.1_compressed.pt", lambda content: content["state_dict"].pop("visual.proj"))
    change(tmp_path / "image_reward" / "ImageReward.pt", lambda content: content.pop("blip.visual_encoder.norm.bias"))
    tensors = load_file(tmp_path / "pickscore" / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, tmp_path / "pickscore" / "model.safetensors", {"format": "pt"})
    change(tmp_path / "aesthetic" / HEAD, lambda content: content.pop("layers.7.bias"))
    expected = {
        "HPSv2": "tiny-hps",
        "ImageReward": "post_layernorm",
        "PickScore": "visual_projection",
        "Aesthetic": "head",
    }
    for name, says in expected.items():
        with pytest.raises(ValueError, match=says) as error:
            build(name, tmp_path).load()
        sentence(error)


def change(file, edit):
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


def test_a_checkpoint_with_code_is_refused(weights, tmp_path):
    copied(weights, tmp_path, "aesthetic", "clip")
    torch.save({"layers.0.weight": Prompt("a", "b")}, tmp_path / "aesthetic" / HEAD)
    with pytest.raises(ValueError, match="cannot be read") as error:
        build("Aesthetic", tmp_path).load()
    sentence(error)


def test_prompts_are_more_than_texts():
    with pytest.raises(ValueError, match=r"expected prompts as flowopd.Prompt\(text, task\), got 'a cat'"):
        CLIPScore("nowhere").score(torch.zeros(1, 3, 28, 28), ["a cat"])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        CLIPScore(batch_size=0)
    with pytest.raises(ValueError, match="dtype is 'fp16'; expected one of float32, bfloat16, float16"):
        PickScore(dtype="fp16")


@every_reward
def test_a_config_names_it_as_a_reward(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    options = {"dtype": "bfloat16", "batch_size": 4, "offload": True}
    config = parser.parse_object({"reward": {"class_path": f"flowopd.rewards.{name}", "init_args": options}})
    reward = parser.instantiate_classes(config).reward
    assert type(reward).__name__ == name
    assert (reward.batch_size, reward.offload) == (4, True)
