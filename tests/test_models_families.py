"""The laws of further families: all that a backbone promises, by its stock pipeline, and what is peculiar to it."""

from functools import partial

import pytest
import tiny
import tiny_families
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, QwenImagePipeline, ZImagePipeline

from flowopd.core import ODE, FlowSchedule
from flowopd.models import Flux2KleinBackbone, FluxBackbone, LoRASpec, QwenImageBackbone, ZImageBackbone
from flowopd.models.adapters.files import save_adapter
from flowopd.models.adapters.lora import ATTENTION, adapter_parameters, add_adapter, attach, take_adapter
from flowopd.models.shards import blocks
from flowopd.preflight.plan import measured
from flowopd.preflight.shapes import Shapes, parameter_count
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.testing import check_backbone, draw_stock
from flowopd.training import FlowPolicy

TEXTS = ["red 1", "a longer one: blue 22, and a sign"]
SMALL = {"dtype": "float32", "resolution": (16, 24)}
FAMILIES = {
    "zimage": (tiny_families.zimage, partial(ZImageBackbone, **SMALL, max_sequence_length=96), (16, 8, 12)),
    "qwen": (tiny_families.qwen, partial(QwenImageBackbone, **SMALL, negative_prompt=" "), (4, 4, 6)),
    "flux": (tiny_families.flux, partial(FluxBackbone, **SMALL, max_sequence_length=48), (4, 8, 12)),
    "klein": (tiny_families.klein, partial(Flux2KleinBackbone, **SMALL, max_sequence_length=96), (16, 4, 6)),
}
PADDED = ("flux", "klein")  # their transformers read padding too
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: str(tmp_path_factory.mktemp("pipelines") / family) for family in FAMILIES}
    for family, folder in made.items():
        FAMILIES[family][0]().save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def bases(folders):
    """Backbones without adapters; read-only."""
    return {family: loaded(family, folder) for family, folder in folders.items()}


def loaded(family, folder, **options):
    ready = FAMILIES[family][1](folder, **options)
    ready.load()
    return ready


@every_family
def test_a_family_holds_every_law_of_a_backbone(family, folders):
    """Pictures of two texts of different length, not square, by 4 and by 10 steps, with guidance and without."""
    ours = loaded(family, folders[family])
    found = check_backbone(ours, ours.pipeline_class.from_pretrained(folders[family]), TEXTS)
    assert found["ratio_is_one"] == found["none_is_the_base"] == 0


@every_family
def test_a_picture_has_a_height_and_a_width(family, bases):
    base, shape = bases[family], FAMILIES[family][2]
    assert base.latent_shape() == shape
    assert base.decode(torch.zeros(1, *shape)).shape == (1, 3, 16, 24)
    config, vae = base.network.config, base.files.config("vae")
    with pytest.raises(ValueError, match=r"resolution is \(16, 18\); expected a multiple of \d pixels"):
        type(base)("x", resolution=(16, 18)).latent_of(config, vae)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PADDED])
def test_texts_are_kept_without_padding(family, bases):
    short, long = (bases[family].encode([text]) for text in TEXTS)
    both = bases[family].encode(TEXTS)
    assert short.tokens.shape[1] < long.tokens.shape[1] == both.tokens.shape[1]
    assert both.lengths() == [short.tokens.shape[1], long.tokens.shape[1]]
    assert torch.equal(both[0:1].trimmed().tokens, short.tokens)


@pytest.mark.parametrize("family", PADDED)
def test_texts_are_padded_where_padding_is_read(family, bases):
    longest = bases[family].max_sequence_length
    assert [bases[family].encode([text]).lengths() for text in TEXTS] == [[longest], [longest]]


@every_family
def test_an_encoding_does_not_depend_on_the_texts_beside_it(family, folders, bases):
    """To the bit: a resumed run meets its prompts in other company."""
    alone = loaded(family, folders[family]).encode(TEXTS[:1])
    assert torch.equal(alone.tokens, bases[family].encode(TEXTS)[:1].trimmed().tokens)


@every_family
def test_texts_found_on_disk_are_the_same(family, folders, tmp_path):
    first, second = (loaded(family, folders[family], text_cache=str(tmp_path)).encode(TEXTS) for _ in range(2))
    assert all(torch.equal(part, second.parts()[name]) for name, part in first.parts().items())


@every_family
def test_a_new_adapter_reaches_every_block(family, folders):
    network = loaded(family, folders[family]).network
    add_adapter(network, "student", LoRASpec(rank=2), FAMILIES[family][1](folders[family]).changed(network.config))
    adapted = [any("lora_A" in name for name, _ in block.named_parameters()) for block in blocks(network)]
    assert adapted
    assert all(adapted)


def test_a_block_without_an_adapter_is_told(folders):
    network = loaded("zimage", folders["zimage"]).network
    with pytest.warns(UserWarning, match=r"adapter 'student' changes nothing in 2 of 4 blocks, such as a ZImage"):
        add_adapter(network, "student", LoRASpec(targets=["layers.0.attention.to_q", "layers.1.attention.to_q"]))


@pytest.mark.parametrize(
    ("kind", "path", "size"),
    [
        (ZImageBackbone, "Tongyi-MAI/Z-Image", 6_154_908_736),
        (QwenImageBackbone, "Qwen/Qwen-Image", 20_430_401_088),
        (FluxBackbone, "black-forest-labs/FLUX.1-dev", 11_901_408_320),
        (Flux2KleinBackbone, "black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576),
        (Flux2KleinBackbone, "black-forest-labs/FLUX.2-klein-base-9B", 9_078_581_248),
    ],
)
def test_a_published_model_has_its_size(kind, path, size):
    assert parameter_count(Shapes(kind(path)).transformer()) == size


@every_family
def test_a_step_is_measured_on_random_weights(family, folders):
    policy = FlowPolicy(FAMILIES[family][1](folders[family]), None)
    speed = measured(policy, tiny.data(), False, "cpu")
    assert 0 < speed.forward < speed.trained


@every_family
def test_the_benchmark_runs_on_the_shapes_of_a_folder(family, folders, capsys):
    from benchmarks import family_step

    name = {"qwen": "qwen_image", "flux": "flux1", "klein": "flux2_klein"}.get(family, family)
    small = {"path": folders[family], "side": 16, "tokens": 96, "images": 4, "rows": 2}
    found = family_step.main(["--family", name, *(f"--{key}={value}" for key, value in small.items())])
    assert found["seconds"] > 0
    assert '"tflop_per_picture"' in capsys.readouterr().out


@pytest.mark.gpu
def test_a_folded_step_of_z_image_fits_80_gigabytes():
    from benchmarks import family_step

    found = family_step.main([])
    assert found["peak_gb"] <= 80
    assert found["static_gb"] == pytest.approx(found["static_gb_planned"], rel=0.1)


@every_family
def test_a_sampler_of_a_policy_is_on_the_grid_of_the_folder(family, folders):
    backbone = loaded(family, folders[family])
    assert repr(FlowPolicy(backbone, None).sampler.schedule) == repr(backbone.schedule())


@pytest.mark.parametrize("shift", [6.0, 3.0])
def test_the_grid_of_z_image_is_that_of_the_folder(folders, shift, tmp_path):
    other = ZImagePipeline.from_pretrained(folders["zimage"])
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    other.save_pretrained(tmp_path)
    assert repr(loaded("zimage", str(tmp_path)).schedule()) == repr(FlowSchedule(shift))


def test_z_image_refuses_float16(folders, bases):
    with pytest.raises(ValueError, match="a ZImagePipeline overflows float16; choose bfloat16 or float32"):
        loaded("zimage", folders["zimage"], dtype="float16")
    x, cond = torch.zeros(1, *bases["zimage"].latent_shape()), bases["zimage"].encode(["a"])
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="precision bf16-mixed or 32-true"):
        bases["zimage"].velocity(x, torch.ones(1), cond)


def test_guidance_of_qwen_image_keeps_the_norm_of_every_token(bases):
    conditional, unconditional = torch.randn(2, 2, 4, 4, 6).unbind()
    guide = bases["qwen"].guide
    tokens = QwenImagePipeline._pack_latents(guide(conditional, unconditional, 4.0), 2, 4, 4, 6)
    norms = QwenImagePipeline._pack_latents(conditional, 2, 4, 4, 6).norm(dim=-1)
    torch.testing.assert_close(tokens.norm(dim=-1), norms)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


def test_projections_of_a_block_of_one_stream_of_flux_2_are_one_that_is_adapted(folders):
    network = loaded("klein", folders["klein"]).network
    with pytest.warns(UserWarning, match=r"adapter 'usual' changes nothing in 1 of 2 blocks"):
        add_adapter(network, "usual", LoRASpec(rank=2), ATTENTION)
    add_adapter(network, "student", LoRASpec(rank=2), Flux2KleinBackbone.modules)
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in take_adapter(network, "student").parts


def test_the_grid_of_flux_2_depends_on_the_number_of_steps(bases):
    """Four levels of ten steps are not those of four."""
    few, many = (bases["klein"].schedule().sigmas(n) for n in (10, 50))
    assert not torch.allclose(few[1:], many[5::5], atol=0.01)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_embedded_guidance_is_the_guidance_scale_of_flux(folders, bases, guidance):
    told = bases["flux"].at_embedded(guidance)
    noise, stock = torch.randn(2, 4, 8, 12), FluxPipeline.from_pretrained(folders["flux"])
    sampler = Sampler(num_steps=4, dynamics=ODE()).on(told)
    pictures = told.decode(sampler.draw(told.velocity, told.encode(TEXTS), noise))
    torch.testing.assert_close(pictures, draw_stock(told, stock, TEXTS, noise, 4, 1.0), rtol=0, atol=1e-5)


def test_a_teacher_may_be_told_another_embedded_guidance_than_the_student(folders, tmp_path):
    ours = loaded("flux", folders["flux"])
    add_adapter(ours.network, "expert", LoRASpec(rank=2), ours.targets)
    for factor in adapter_parameters(ours.network, "expert"):
        factor.data.normal_(std=0.1)
    adapter = take_adapter(ours.network, "expert")
    save_adapter(adapter, tmp_path)
    state = torch.randn(2, 4, 8, 12), torch.tensor([0.9, 0.3]), ours.encode(TEXTS)
    other = loaded("flux", folders["flux"], embedded_guidance=1.0)
    attach(other.network, "expert", adapter)
    path = str(tmp_path)
    for kind, name in ((BaseTeacher, None), (partial(LoRATeacher, path), "expert")):
        plain, told, twin = (kind(guidance_scale=2.0, embedded_guidance=number) for number in (None, 1.0, 1.0))
        for teacher in (plain, told, twin):
            teacher.attach(ours)
        assert torch.equal(plain.velocity(*state), ours.velocity(*state, name, 2.0))
        assert torch.equal(told.velocity(*state), other.velocity(*state, name, 2.0))
        assert not torch.equal(told.velocity(*state), plain.velocity(*state))
        assert told.identity == twin.identity != plain.identity


def test_a_model_that_reads_no_guidance_is_told_none(folders, bases, tmp_path):
    with pytest.raises(ValueError, match="a ZImageBackbone reads no guidance; leave embedded_guidance out"):
        BaseTeacher(embedded_guidance=3.5).attach(bases["zimage"])
    with pytest.raises(ValueError, match=r"reads a guidance, and embedded_guidance is None; expected a number"):
        loaded("flux", folders["flux"], embedded_guidance=None)
    schnell = FluxPipeline.from_pretrained(folders["flux"])
    config = {**schnell.transformer.config, "guidance_embeds": False}
    schnell.transformer = type(schnell.transformer).from_config(config)
    schnell.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads no guidance, and embedded_guidance is 3.5; expected null"):
        loaded("flux", str(tmp_path))
    ours = loaded("flux", str(tmp_path), embedded_guidance=None)
    with pytest.raises(ValueError, match="a FluxBackbone reads no guidance"):
        ours.at_embedded(3.5)
    assert ours.call(1.0) == {"true_cfg_scale": 1.0, "negative_prompt": ""}
