"""The laws of the proof of a backbone: what is sound passes, and every fault is named."""

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline

from flowopd.core import LinearSchedule
from flowopd.models import SD3Backbone
from flowopd.records import Conditioning
from flowopd.testing import check_backbone

SMALL = {"texts": ["red 1", "blue 22"], "steps": [4], "scales": [1.0, 4.5]}


class Backwards(SD3Backbone):
    """The velocity from noise to picture."""

    def velocity_from(self, output, x):
        return -super().velocity_from(output, x)


class OtherGrid(SD3Backbone):
    """Steps of its own."""

    def grid(self, scheduler, latent):
        return LinearSchedule()


class Mixing(SD3Backbone):
    """Texts that read one another."""

    def inputs(self, x, sigma, cond):
        tokens = cond.tokens.mean(0, keepdim=True).expand(len(x), -1, -1)
        return super().inputs(x, sigma, Conditioning(tokens, cond.pooled))


class Dropping(SD3Backbone):
    """A training forward that drops out."""

    def velocity_from(self, output, x):
        velocity = super().velocity_from(output, x)
        return torch.nn.functional.dropout(velocity, 0.1, training=self.network.training)


class Deaf(SD3Backbone):
    """Targets that the pictures do not depend on."""

    modules = (*SD3Backbone.modules, "ff.net.2")

    def load(self, device="cpu"):
        super().load(device)
        self.network.transformer_blocks[0].ff.register_forward_hook(lambda module, given, answer: answer.detach())


def proof(kind, path, **options):
    backbone = kind(path, **({"dtype": "float32", "max_sequence_length": 8} | options))
    backbone.load()
    return check_backbone(backbone, StableDiffusion3Pipeline.from_pretrained(path), **SMALL)


def test_stable_diffusion_3_holds_every_law_of_a_backbone(tiny_pipeline):
    found = proof(SD3Backbone, tiny_pipeline, resolution=(16, 12))
    assert found["ratio_is_one"] == found["none_is_the_base"] == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Backwards, "pictures are those of the pipeline"),
        (OtherGrid, "noise levels are those of the pipeline's own scheduler"),
        (Mixing, "pictures are those of the pipeline|A row alone"),
        (Dropping, "A training forward of what sampled a step"),
        (Deaf, "no gradient reaches transformer_blocks.0.ff.net.2.lora_A"),
    ],
)
def test_a_fault_is_named(tiny_pipeline, kind, said):
    with pytest.raises(AssertionError, match=said):
        proof(kind, tiny_pipeline)


def test_a_backbone_outside_of_diffusers_is_held_to_a_function(tiny_pipeline):
    ours, other = tiny.loaded(tiny_pipeline), tiny.loaded(tiny_pipeline)
    seen = []

    def draw(texts, noise, num_steps, scale):
        from flowopd.rollouts import Sampler

        seen.append((num_steps, scale))
        sampler = Sampler(num_steps=num_steps).on(other)
        field = lambda x, sigma, cond: other.velocity(x, sigma, cond, None, scale)  # noqa: E731
        return other.decode(sampler.draw(field, other.encode(texts), noise))

    assert check_backbone(ours, draw, **SMALL)["pictures_are_the_pipelines"] == 0
    assert seen == [(4, 1.0), (4, 4.5)]
