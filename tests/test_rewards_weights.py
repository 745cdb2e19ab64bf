"""The laws of what rewards say they hold: the published networks to the number, and a shared one once."""

from itertools import pairwise

import open_clip
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    SwinConfig,
)

from flowopd import rewards
from flowopd.preflight.plan import Hardware, plan
from flowopd.rewards import Aesthetic, CLIPScore, DeQA, GenEval, ImageReward, PickScore, Weighted
from flowopd.rewards.clip import OPENAI_L14
from flowopd.rewards.deqa.owl2 import Owl2, Sizes
from flowopd.rewards.geneval.detector import META, Detector
from flowopd.rewards.image_reward import text_config
from flowopd.rewards.model import ModelReward, resident_bytes
from flowopd.teachers import BaseTeacher
from flowopd.training import OPDStudent, RewardCallback, TeacherCallback

# ------------------------------------------------------------------------------ the networks by their published configs


def clip(name: str) -> nn.Module:
    return open_clip.model.CLIP(**open_clip.get_model_config(name))


def pickscore() -> nn.Module:
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    return CLIPModel(CLIPConfig(projection_dim=1024, text_config=text, vision_config=vision | {"patch_size": 14}))


def head() -> nn.Module:
    """Of Aesthetic and of ImageReward."""
    return nn.Sequential(*[nn.Linear(*sizes) for sizes in pairwise([768, 1024, 128, 64, 16, 1])])


def blip() -> nn.Module:
    """BLIP large, by ImageReward's ``med_config.json``."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = BlipVisionModel(BlipVisionConfig(**sizes, image_size=224, patch_size=16))
    words = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    words |= {"num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    return nn.ModuleList([vision, BlipTextModel(text_config(words, 1024), add_pooling_layer=False), head()])


def detector() -> nn.Module:
    """Mask2Former on Swin-S."""
    stages = [f"stage{number}" for number in range(1, 5)]
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages)
    return Detector(Mask2FormerConfig(backbone_config=swin, num_labels=80))


NETWORKS = {
    OPENAI_L14: lambda: clip("ViT-L-14"),
    "yuvalkirstain/PickScore_v1": pickscore,
    "xswu/HPSv2": lambda: clip("ViT-H-14"),
    "camenduru/improved-aesthetic-predictor": head,
    "THUDM/ImageReward": blip,
    "zhiyuanyou/DeQA-Score-Mix3": lambda: Owl2(Sizes()),
    META: detector,
}
HELD = {
    name: count
    for kind in ("PickScore", "HPSv2", "ImageReward", "CLIPScore", "Aesthetic", "GenEval", "DeQA")
    for name, count in getattr(rewards, kind).weights.items()
}


@pytest.mark.parametrize("name", HELD)
def test_a_reward_says_how_many_numbers_its_networks_have(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in NETWORKS[name]().parameters()) == HELD[name]


def test_a_network_that_rewards_share_is_counted_once():
    alone = resident_bytes([CLIPScore()])
    assert alone == {f"{OPENAI_L14}, float32": 4 * 427_616_513}
    assert resident_bytes([CLIPScore(), CLIPScore(), GenEval(), Aesthetic()]) == alone | {
        f"{META}, float32": 4 * 68_741_083,
        "camenduru/improved-aesthetic-predictor, float32": 4 * 927_969,
    }
    assert sum(resident_bytes([CLIPScore(), CLIPScore(dtype="bfloat16")]).values()) == 6 * 427_616_513


def test_terms_count_and_what_is_offloaded_does_not():
    mixed = Weighted({"a": PickScore(offload=True), "b": ImageReward(dtype="float16")}, {"a": 1.0, "b": 1.0})
    assert resident_bytes([mixed, DeQA(offload=True), tiny.Brightness()]) == {"THUDM/ImageReward, float16": 892_413_378}


class Mine(ModelReward):
    """A reward from outside the package."""

    weights = {"me/mine": 1000}  # noqa: RUF012

    def read(self):
        raise AssertionError("a plan reads nothing")

    networks = forward = read


def test_a_plan_counts_rewards_from_anywhere(tiny_pipeline):
    callbacks = [TeacherCallback(["red"], BaseTeacher()), RewardCallback("mine", Mine(), weight=0.0)]
    callbacks += [RewardCallback("clip", CLIPScore(), weight=0.0), RewardCallback("beauty", Aesthetic(), weight=0.0)]
    resident = plan(tiny.policy(OPDStudent, tiny_pipeline), tiny.data(), callbacks, Hardware()).resident
    found = {name: size for name, size in resident.items() if name.startswith("reward network ")}
    assert found == {
        "reward network me/mine, float32": 4000,
        f"reward network {OPENAI_L14}, float32": 4 * 427_616_513,
        "reward network camenduru/improved-aesthetic-predictor, float32": 4 * 927_969,
    }
