"""DeQA: its parts are CLIP, attention and LLaMA of stock libraries, and its files are read strictly."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import load_file, save_file

from flowopd.records import Prompt
from flowopd.rewards import DeQA
from flowopd.rewards.deqa.owl2 import AFTER, BEFORE, LEVELS, AbstractorSizes, Owl2, Sizes, VisionSizes, rotary
from flowopd.rewards.deqa.reward import preprocess, read_owl2

VISION = VisionSizes(32, 48, num_hidden_layers=2, num_attention_heads=4, image_size=28)
ABSTRACTOR = AbstractorSizes(6, 32, 40, num_hidden_layers=2, num_attention_heads=4)
SIZES = Sizes(32000, 48, 64, 2, num_attention_heads=4, vision=VISION, abstractor=ABSTRACTOR)


def config():
    """Of the tiny network, as published: LLaMA's numbers on top, what it looks through in visual_config."""
    top = asdict(SIZES)
    visual = {"visual_model": top.pop("vision"), "visual_abstractor": top.pop("abstractor")}
    return {"model_type": "mplug_owl2", "hidden_act": "silu", **top, "visual_config": visual}


def random_owl2(equal_copies=False):
    network = Owl2(SIZES)
    with torch.no_grad():
        for name, value in network.named_parameters():
            scale = 0.4 if name.endswith(("k_pos_embed", "q_pos_embed", "bias", "query_embeds", "vit_eos")) else 0.2
            value.copy_(torch.randn_like(value) * scale + (1 if "norm" in name and "weight" in name else 0))
        if equal_copies:
            state = network.state_dict()
            for name, value in state.items():
                state[name.replace("multiway.1", "multiway.0")].copy_(value)
    return network.eval().requires_grad_(False)


def save(network, folder, shards=3, kind="safetensors"):
    """Write the published layout: shards, the index that finds them, config.json."""
    folder.mkdir()
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    names, index = list(state), {}
    stem, write = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}"
        write({name: state[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config()))
    return str(folder)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return random_owl2()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return save(network, tmp_path_factory.mktemp("deqa") / "DeQA-tiny")


def pictures(rows=3, height=40, width=32):
    coarse = torch.rand(rows, 3, 5, 4)
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round().to(torch.uint8)


def prompts(rows=3):
    return [Prompt("anything", "any")] * rows


# ------------------------------------------------------------------------------------------------- the whole reward


def test_the_score_is_the_expected_level_over_five(folder, network):
    images = pictures()
    scores = DeQA(folder, dtype="float32").detail(images, prompts())
    odds = network(preprocess(images, 28)).softmax(-1)
    expected = sum(odds[:, i] * worth for i, worth in enumerate((5, 4, 3, 2, 1)))
    torch.testing.assert_close(scores.parts["paper"], expected)
    torch.testing.assert_close(scores.value, expected / 5)
    assert list(LEVELS) == ["excellent", "good", "fair", "poor", "bad"]
    assert scores.value.dtype == torch.float32
    assert scores.value.std() > 1e-4, "the tiny network looks at the image"


def test_batched_equals_one_by_one(folder):
    images = pictures(5)
    together = DeQA(folder, dtype="float32", batch_size=4).score(images, prompts(5))
    alone = [DeQA(folder, dtype="float32").score(image[None], prompts(1)) for image in images]
    torch.testing.assert_close(together, torch.cat(alone))


def test_bytes_and_floats_agree(folder):
    images = pictures()
    reward = DeQA(folder, dtype="float32")
    assert torch.equal(reward.score(images, prompts()), reward.score(images / 255, prompts()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(folder, dtype):
    images = pictures()
    exact = DeQA(folder, dtype="float32").detail(images, prompts()).parts["paper"]
    rough = DeQA(folder, dtype=dtype).detail(images, prompts()).parts["paper"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_weights_are_read_on_first_use_and_rest_on_the_cpu_if_asked(folder):
    reward = DeQA(folder, dtype="float32", offload=True)
    assert not hasattr(reward, "network")
    first = reward.score(pictures(), prompts())
    assert next(reward.network.parameters()).device.type == "cpu"
    assert not any(value.requires_grad for value in reward.network.parameters())
    assert first.isfinite().all()


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(folder):
    images = pictures()
    there = DeQA(folder, dtype="float16", offload=True).score(images.cuda(), prompts())
    torch.testing.assert_close(there.cpu(), DeQA(folder, dtype="float32").score(images, prompts()), atol=0.01, rtol=0)


# ------------------------------------------------------------------------------------------------ against stock parts


def stock_vision(network):
    """transformers' CLIP vision model with the same weights: q, k and v apart."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {key: value for key, value in asdict(VISION).items()}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu")).eval()
    ours = {name.removeprefix("model.vision_model."): value for name, value in network.state_dict().items()}
    heads = VISION.num_attention_heads
    theirs = {}
    for name in clip.state_dict():
        key = name.removeprefix("vision_model.")
        key = key.replace("class_embedding", "cls_token").replace("patch_embedding", "patch_embed")
        key = key.replace("position_embedding.weight", "position_embedding").replace("pre_layrnorm", "pre")
        key = key.replace("pre.", "embeddings.pre_layernorm.").replace("out_proj", "dense")
        key = key.replace("layer_norm1", "input_layernorm").replace("layer_norm2", "post_attention_layernorm")
        part = next((i for i, letter in enumerate("qkv") if f".{letter}_proj." in key), None)
        if part is None:
            theirs[name] = ours[key].squeeze() if key.endswith(("cls_token", "position_embedding")) else ours[key]
        elif not name.endswith("position_ids"):
            joint = ours[key.replace(f"{'qkv'[part]}_proj", "query_key_value")]
            theirs[name] = joint.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
    clip.load_state_dict(theirs, strict=False)
    return clip


def stock_language(network, copy):
    """transformers' LLaMA that holds one of the two copies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: value for key, value in asdict(SIZES).items() if key not in ("vision", "abstractor")}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, attn_implementation="eager")).eval()
    ours = {name.replace(f"multiway.{copy}.", ""): value for name, value in network.state_dict().items()}
    llama.load_state_dict({name: ours[name] for name in llama.state_dict()})
    return llama


def stock_abstractor(network, image):
    """The abstractor by torch's multi-head attention, layer by layer."""
    state, prefix = network.state_dict(), "model.visual_abstractor."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    queries = state["query_embeds"].expand(len(image), -1, -1)
    for i in range(ABSTRACTOR.num_hidden_layers):
        layer = {n.removeprefix(f"encoder.layers.{i}.crossattention."): v for n, v in state.items()}

        def affine(name, x, layer=layer):
            return F.linear(x, layer[f"{name}.weight"], layer[f"{name}.bias"])

        def norm(name, x, eps, layer=layer):
            return F.layer_norm(x, x.shape[-1:], layer[f"{name}.weight"], layer[f"{name}.bias"], eps)

        place = layer["attention.q_pos_embed"]
        queries = norm("norm1", queries, 1e-5)
        context = torch.cat([queries, norm("normk", image, 1e-5)], 1)
        read, _ = F.multi_head_attention_forward(
            (queries + place).transpose(0, 1),
            (context + torch.cat([place, layer["attention.k_pos_embed"]])).transpose(0, 1),
            context.transpose(0, 1),
            ABSTRACTOR.hidden_size,
            ABSTRACTOR.num_attention_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([layer[f"attention.{part}.bias"] for part in ("query", "key", "value")]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=layer["output.out_proj.weight"],
            out_proj_bias=layer["output.out_proj.bias"],
            training=False,
            use_separate_proj_weight=True,
            q_proj_weight=layer["attention.query.weight"],
            k_proj_weight=layer["attention.key.weight"],
            v_proj_weight=layer["attention.value.weight"],
        )
        queries = queries + read.transpose(0, 1)
        inner = norm("output.norm2", queries, 1e-5)
        gated = F.silu(affine("output.mlp.w1", inner)) * affine("output.mlp.w3", inner)
        queries = queries + affine("output.mlp.w2", norm("output.mlp.ffn_ln", gated, 1e-6))
    seen = F.linear(queries, state["visual_fc.weight"], state["visual_fc.bias"])
    return torch.cat([seen, state["vit_eos"].expand(len(image), -1, -1)], 1)


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_vision_part_is_clip(network):
    pixels = torch.randn(2, 3, 28, 28)
    theirs = stock_vision(network)(pixels).last_hidden_state
    near(network.model.vision_model(pixels), network.model.vision_model.post_layernorm(theirs))


def test_the_abstractor_is_multi_head_attention(network):
    image = torch.randn(2, VISION.tokens, 32)
    near(network.model.visual_abstractor(image), stock_abstractor(network, image))


@pytest.mark.parametrize(("copy", "lengths"), [(0, (11, 0, 0)), (0, (4, 0, 7)), (1, (0, 11, 0))])
def test_tokens_of_one_modality_see_a_llama(network, copy, lengths):
    x = torch.randn(2, 11, SIZES.hidden_size)
    near(network.model.language(x, lengths), stock_language(network, copy).model(inputs_embeds=x).last_hidden_state)


def test_with_equal_copies_the_whole_network_is_clip_attention_and_llama():
    network = random_owl2(equal_copies=True)
    pixels = torch.randn(2, 3, 28, 28)
    image = stock_vision(network)(pixels).last_hidden_state
    image = stock_abstractor(network, network.model.vision_model.post_layernorm(image))
    llama = stock_language(network, 0)
    before, after = (llama.model.embed_tokens(torch.tensor([ids] * 2)) for ids in (BEFORE, AFTER))
    logits = llama(inputs_embeds=torch.cat([before, image, after], 1)).logits[:, -1]
    near(network(pixels), logits[:, list(LEVELS.values())])


def test_a_token_uses_the_copies_of_its_modality_and_attends_across(network):
    """Against a second formulation: one token, one head, one weight at a time."""
    lengths, heads = (3, 4, 2), SIZES.num_attention_heads
    x = torch.randn(1, 9, SIZES.hidden_size)
    layer, modality = network.model.layers[0], [0] * 3 + [1] * 4 + [0] * 2
    state = layer.state_dict()

    def normal(name, token, kind):
        return token / (token.square().mean() + SIZES.rms_norm_eps).sqrt() * state[f"{name}.multiway.{kind}.weight"]

    def turned(vector, place):
        half = len(vector) // 2
        turn = torch.polar(torch.ones(half), place / SIZES.rope_theta ** (torch.arange(half) / half))
        both = torch.view_as_real(torch.complex(vector[:half], vector[half:]) * turn)
        return torch.cat([both[:, 0], both[:, 1]])

    entering = [normal("input_layernorm", token, kind) for token, kind in zip(x[0], modality, strict=True)]
    keys = [state[f"self_attn.k_proj.multiway.{m}.weight"] @ t for t, m in zip(entering, modality, strict=True)]
    values = [state[f"self_attn.v_proj.multiway.{m}.weight"] @ t for t, m in zip(entering, modality, strict=True)]
    out = []
    for place, (token, kind) in enumerate(zip(x[0], modality, strict=True)):
        query = (state["self_attn.q_proj.weight"] @ entering[place]).chunk(heads)
        read = []
        for head in range(heads):
            near_keys = [turned(key.chunk(heads)[head], i) for i, key in enumerate(keys[: place + 1])]
            odds = (torch.stack(near_keys) @ turned(query[head], place) / len(query[head]) ** 0.5).softmax(0)
            read.append(sum(p * value.chunk(heads)[head] for p, value in zip(odds, values, strict=False)))
        token = token + state["self_attn.o_proj.weight"] @ torch.cat(read)
        inner = normal("post_attention_layernorm", token, kind)
        gated = F.silu(state["mlp.gate_proj.weight"] @ inner) * (state["mlp.up_proj.weight"] @ inner)
        out.append(token + state["mlp.down_proj.weight"] @ gated)

    turn = rotary(x, SIZES.hidden_size // heads, SIZES.rope_theta)
    near(layer(x, lengths, turn)[0], torch.stack(out))


def test_half_precision_norms_do_not_overflow():
    network = Owl2(SIZES).half()
    large = torch.full((1, 2, SIZES.hidden_size), 3000.0, dtype=torch.float16)  # its square is beyond float16
    assert network.model.norm(large).isfinite().all()


def test_the_published_sizes_give_the_published_network():
    with torch.device("meta"):
        network = Owl2(Sizes())
    count = sum(value.numel() for name, value in network.named_parameters() if "pos_embed" not in name)
    assert count == pytest.approx(8.20e9, rel=1e-3)
    assert len(BEFORE) + Sizes().abstractor.num_learnable_queries + 1 + len(AFTER) == 92


# ---------------------------------------------------------------------------------------------------- preprocessing


def test_a_square_image_is_resized_as_pil_does():
    image = pictures(1, 64, 64)
    pil = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    assert (preprocess(image, 28)[0] * std + mean - expected).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(("height", "width"), [(28, 14), (14, 28), (28, 28)])
def test_the_padding_is_the_mean_colour_on_both_sides(height, width):
    white = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
    bright = preprocess(white, 28)[0] > 1
    rows, columns = bright.all(0).nonzero(as_tuple=True)
    assert len(rows) == height * width
    assert rows.min() == (28 - height) // 2
    assert columns.min() == (28 - width) // 2
    dark = preprocess(white, 28)[0][~bright]
    assert not len(dark) or dark.abs().max() < 1 / 255 / min(
        OPENAI_DATASET_STD
    )  # the mean, truncated to a byte, is nearly 0


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("shards", "kind"), [(3, "bin"), (2, "safetensors")])
def test_every_published_layout_holds_the_same_network(network, tmp_path, shards, kind):
    read = read_owl2(save(network, tmp_path / "deqa", shards, kind), dtype=torch.float32)
    for (name, value), same in zip(network.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(value, same), name


def test_one_file_needs_no_index_and_stored_angles_are_ignored(network, tmp_path):
    folder = tmp_path / "deqa"
    save(network, folder, 1)
    (folder / "model.safetensors.index.json").unlink()
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(tensors, folder / "model.safetensors")
    assert read_owl2(str(folder), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def edited(folder, change):
    """Apply ``change`` to the tensors of the last shard."""
    file = max(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def drop(tensors):
    del tensors[min(tensors)]


def add(tensors):
    tensors["model.layers.7.extra"] = torch.ones(1)


def reshape(tensors):
    name = min(tensors)
    tensors[name] = torch.ones(3, 1, 4, 1, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop, "lack .*; expected"), (add, "model.layers.7.extra"), (reshape, r"shape \(3, 1, 4, 1, 5\), but")],
)
def test_a_checkpoint_of_another_network_is_refused(network, tmp_path, change, message):
    save(network, tmp_path / "deqa")
    edited(tmp_path / "deqa", change)
    with pytest.raises(ValueError, match=message):
        DeQA(str(tmp_path / "deqa"), dtype="float32").score(pictures(), prompts())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_a_missing_file_is_named_with_the_way_to_get_it(network, tmp_path, name):
    save(network, tmp_path / "deqa")
    (tmp_path / "deqa" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"(without|has no) .*{name}.*hf download"):
        DeQA(str(tmp_path / "deqa")).load()


def test_a_model_that_cannot_be_reached_is_a_sentence():
    with pytest.raises(FileNotFoundError, match=r"is not a folder, the hub cannot be reached, .*hf download"):
        DeQA("nobody/has-this-model").load()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_broken_file_is_a_sentence(network, tmp_path, kind):
    save(network, tmp_path / "deqa", 2, kind)
    max((tmp_path / "deqa").glob(f"*.{kind}")).write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"cannot be read .*; download it again"):
        DeQA(str(tmp_path / "deqa")).load()
