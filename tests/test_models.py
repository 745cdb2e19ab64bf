"""The laws of the backbone and of its adapters: parity with stock diffusers and peft, strictness, no global state."""

import math

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import loaded

from flowopd import tiles
from flowopd.core import CPS, ODE, FlowSDE, ShiftedSchedule
from flowopd.models import LoRASpec, SD3Backbone
from flowopd.models.adapters.lora import (
    ATTENTION,
    Adapter,
    adapter_parameters,
    add_adapter,
    take_adapter,
    use_adapter,
)
from flowopd.records import Prompt
from flowopd.rollouts import RowNoise, Sampler
from flowopd.teachers import LoRATeacher

TEXTS = ["red 1", "blue 22", "red 1"]
FEED_FORWARD = ("attn.to_q", "ff.net.0.proj", "ff.net.2")


@pytest.fixture(scope="module")
def base(tiny_pipeline):
    """A backbone without adapters; read-only."""
    return loaded(tiny_pipeline)


@pytest.fixture
def fresh(tiny_pipeline):
    """A backbone of its own."""
    return loaded(tiny_pipeline)


@pytest.fixture(scope="module")
def stock(tiny_pipeline):
    """The stock pipeline; read-only."""
    return StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def state(base):
    """Arguments of a velocity: states, noise levels and encodings of three rows."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    return x, torch.tensor([1.0, 0.6, 0.1]), base.encode(TEXTS)


def stock_velocity(transformer, state):
    x, sigma, cond = state
    with torch.no_grad():
        return transformer(x, cond.tokens, cond.pooled, 1000 * sigma, return_dict=False)[0]


def random_student(network, spec=None) -> Adapter:
    """Put a trainable adapter "student" with random factors on the network."""
    add_adapter(network, "student", spec or LoRASpec(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in adapter_parameters(network, "student"):
            parameter.normal_(std=0.1)
    return take_adapter(network, "student")


# ------------------------------------------------------------------------------------------------ parity with diffusers


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "clip"])
def test_encodings_are_those_of_the_stock_pipeline(request, t5):
    path = request.getfixturevalue("tiny_pipeline" if t5 else "tiny_pipeline_without_t5")
    ours, theirs = loaded(path), StableDiffusion3Pipeline.from_pretrained(path, **({} if t5 else NO_T5))
    cond, negative = ours.encode(TEXTS), ours.encode([""])
    options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 8, "negative_prompt": ""}
    with torch.no_grad():
        tokens, no_tokens, pooled, no_pooled = theirs.encode_prompt(TEXTS, **options)
    torch.testing.assert_close(cond.tokens, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(negative.expand(3).tokens, no_tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(negative.expand(3).pooled, no_pooled, rtol=0, atol=1e-6)


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def test_a_text_is_encoded_once(fresh, monkeypatch):
    texts, encode = [], StableDiffusion3Pipeline.encode_prompt
    watched = lambda pipe, prompt, **options: texts.extend(prompt) or encode(pipe, prompt, **options)  # noqa: E731
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", watched)
    first = fresh.encode(TEXTS)
    again = fresh.encode(["new", *TEXTS])
    assert list(filter(None, texts)) == ["red 1", "blue 22", "new"]
    assert torch.equal(again.tokens[1:], first.tokens)


def test_an_encoding_does_not_depend_on_the_texts_beside_it(tiny_pipeline):
    """To the bit: a resumed run meets its prompts in other company."""
    texts = [f"red {i}" for i in range(11)]
    together, alone = loaded(tiny_pipeline).encode(texts), [loaded(tiny_pipeline).encode([text]) for text in texts]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in alone]))
    assert torch.equal(together.pooled, torch.cat([one.pooled for one in alone]))


def test_no_sequence_length_leaves_the_t5_out(tiny_pipeline):
    short = loaded(tiny_pipeline, max_sequence_length=0).encode(TEXTS)
    assert short.tokens.shape[1] == tiny.TOKENS


def test_the_velocity_is_the_stock_transformer_s(base, stock, state):
    assert torch.equal(base.velocity(*state), stock_velocity(stock.transformer, state))


@pytest.mark.parametrize(
    ("path", "scale"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 4.5),
        ("hub/models--stabilityai--stable-diffusion-3.5-medium/snapshots/0123abcd", 4.5),
        ("models/stable-diffusion-3.5-large-turbo", 1.0),
        (str(tiles.BASE), 1.0),
        ("runs/tiles/base", 1.0),
        ("somebody/stable-diffusion-3.5-medium-turbo", None),
    ],
)
def test_a_model_that_is_known_says_at_which_guidance_it_is_meant_to_be_drawn(path, scale):
    assert SD3Backbone(path).guidance_scale == scale
    assert SD3Backbone(path, guidance_scale=2.5).guidance_scale == 2.5


def test_guidance_is_that_of_the_negative_prompt(tiny_pipeline, stock, state):
    x, sigma, _ = state
    ours = loaded(tiny_pipeline, negative_prompt="grey 0")
    negative = (x, sigma, ours.encode(["grey 0"] * 3))
    v, v_negative = stock_velocity(stock.transformer, state), stock_velocity(stock.transformer, negative)
    torch.testing.assert_close(ours.velocity(*state, guidance_scale=4.5), v_negative + 4.5 * (v - v_negative))


@pytest.mark.parametrize("resolution", [None, 24], ids=["default", "24px"])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_drawing_is_the_stock_pipeline(tiny_pipeline, stock, scale, resolution):
    ours = loaded(tiny_pipeline, resolution=resolution)
    x, steps = torch.randn(3, *ours.latent_shape()), 5
    sampler = Sampler(num_steps=3, schedule=ShiftedSchedule(), eval_steps=steps, guidance_scale=scale)
    drawn = sampler.draw(field(ours, sampler), ours.encode(TEXTS), x)
    expected = stock_latents(stock, x, steps, scale)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(drawn), stock_images(stock, expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("dynamics", [FlowSDE(0.0), CPS(0.0), ODE()], ids=["flow", "cps", "ode"])
def test_a_rollout_without_noise_is_the_stock_pipeline(base, stock, scale, dynamics):
    sampler = Sampler(num_steps=10, dynamics=dynamics, guidance_scale=scale)
    rollout, noise = rolled_out(base, sampler)
    expected = stock_latents(stock, noise.start(), 10, scale)
    torch.testing.assert_close(rollout.latents[:, -1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(base.decode(rollout.latents[:, -1]), stock_images(stock, expected), rtol=0, atol=1e-5)


def test_a_rollout_without_t5_is_the_stock_pipeline_without_t5(tiny_pipeline_without_t5):
    ours, stock = (
        loaded(tiny_pipeline_without_t5),
        StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_without_t5, **NO_T5),
    )
    rollout, noise = rolled_out(ours, Sampler(num_steps=4, dynamics=FlowSDE(0.0), guidance_scale=4.5))
    torch.testing.assert_close(rollout.latents[:, -1], stock_latents(stock, noise.start(), 4, 4.5), rtol=0, atol=1e-5)


def rolled_out(backbone: SD3Backbone, sampler: Sampler):
    noise = RowNoise(backbone.latent_shape(), "abc", "abc")
    prompts = [Prompt(text, "task") for text in TEXTS]
    return sampler.rollout(field(backbone, sampler), prompts, backbone.encode(TEXTS), noise), noise


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
def test_a_noisy_step_and_its_log_probability_are_the_formulas_in_float64(base, a):
    """Flow-GRPO's, on the grid of SD3.5, at every step, with guidance."""
    sampler = Sampler(num_steps=10, dynamics=FlowSDE(a), guidance_scale=4.5)
    rollout, noise = rolled_out(base, sampler)
    sigmas, x, v = rollout.sigmas.double(), rollout.latents.double(), rollout.velocities.double()
    for j in range(9):
        sigma, dt = sigmas[j], sigmas[j + 1] - sigmas[j]
        g = a * torch.sqrt(sigma / (1 - (sigma if j else sigmas[1])))  # at σ = 1 the next grid point stands in
        mean = x[:, j] * (1 + g**2 * dt / (2 * sigma)) + v[:, j] * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        std = g * torch.sqrt(-dt)
        torch.testing.assert_close(x[:, j + 1], mean + std * noise.step(j).double(), rtol=0, atol=1e-5)
        z = (x[:, j + 1] - mean) / std
        log_prob = (-(z**2) / 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
        torch.testing.assert_close(rollout.log_probs[:, j].double(), log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(x[:, 10], x[:, 9] + (sigmas[10] - sigmas[9]) * v[:, 9], rtol=0, atol=1e-6)


def field(backbone: SD3Backbone, sampler: Sampler):
    return lambda x, sigma, cond: backbone.velocity(x, sigma, cond, None, sampler.guidance_scale)


def stock_latents(stock, x, steps, scale):
    side = 2 * x.shape[-1]
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": 8, "output_type": "latent"}
    return stock(TEXTS, height=side, width=side, latents=x, **options).images


def stock_images(stock, latents):
    latents = latents / stock.vae.config.scaling_factor + stock.vae.config.shift_factor
    with torch.no_grad():
        return stock.image_processor.postprocess(stock.vae.decode(latents, return_dict=False)[0], output_type="pt")


def test_a_resolution_that_does_not_fill_patches_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="resolution is 18; expected a multiple of 4 pixels"):
        loaded(tiny_pipeline, resolution=18).latent_shape()


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index.json; expected a StableDiffusion3Pipeline folder"):
        loaded(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model folder '.*nowhere' does not exist"):
        loaded(str(tmp_path / "nowhere"))
    tiny.vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model '.*' is a AutoencoderKL; expected a SD3Transformer2DModel"):
        loaded(str(tmp_path))


# -------------------------------------------------------------------------------------------- which adapter a call uses


def test_a_new_adapter_changes_nothing(fresh, base, state):
    add_adapter(fresh.network, "student", LoRASpec())
    assert torch.equal(fresh.velocity(*state, adapter="student"), base.velocity(*state))


def test_the_default_adapter_reaches_the_published_modules(fresh):
    """Eight projections per block, seven in the last: 191 in the 24 blocks of SD3.5 Medium."""
    add_adapter(fresh.network, "student", LoRASpec())
    assert len(take_adapter(fresh.network, "student").parts) == 8 * 2 - 1


def test_an_adapter_of_sd35_medium_has_the_published_size():
    """191 modules, 18.78 M of 2.243 B parameters; float32, so that a further teacher costs less than 80 MB."""
    with torch.device("meta"):
        network = tiny.transformer(
            sample_size=128,
            pos_embed_max_size=384,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            dual_attention_layers=tuple(range(13)),
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(2.243e9, rel=1e-3)
    add_adapter(network, "student", LoRASpec())
    factors = adapter_parameters(network, "student")
    assert len(factors) == 2 * 191
    assert sum(factor.numel() for factor in factors) == pytest.approx(18.78e6, rel=1e-3)
    assert sum(factor.nbytes for factor in factors) < 80e6


def test_a_call_without_adapter_is_the_base_whatever_is_loaded(fresh, base, state):
    random_student(fresh.network)
    assert torch.equal(fresh.velocity(*state), base.velocity(*state))
    assert not torch.allclose(fresh.velocity(*state, adapter="student"), base.velocity(*state))


def test_an_adapter_is_put_back_even_after_an_exception(fresh, state):
    random_student(fresh.network)
    before, trainable = fresh.network(*stock_arguments(state))[0], trainable_names(fresh.network)
    with pytest.raises(ZeroDivisionError), use_adapter(fresh.network, None):
        raise ZeroDivisionError
    assert torch.equal(fresh.network(*stock_arguments(state))[0], before)
    assert trainable_names(fresh.network) == trainable


def stock_arguments(state):
    x, sigma, cond = state
    return x, cond.tokens, cond.pooled, 1000 * sigma


def trainable_names(network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_an_unknown_adapter_is_named(fresh, state):
    random_student(fresh.network)
    with pytest.raises(KeyError, match=r"no adapter named 'studnt'; loaded are \['student'\]"):
        fresh.velocity(*state, adapter="studnt")


def test_a_name_can_be_taken_once(fresh):
    random_student(fresh.network)
    with pytest.raises(ValueError, match="already carries an adapter named 'student'"):
        add_adapter(fresh.network, "student", LoRASpec())


def test_targets_that_do_not_exist_are_refused(fresh):
    with pytest.raises(ValueError, match=r"adapter 'student' does not fit this network: .*to_nowhere"):
        add_adapter(fresh.network, "student", LoRASpec(targets=["to_nowhere"]))


@pytest.mark.parametrize("student_first", [True, False])
def test_only_the_student_takes_gradient(fresh, state, tiny_pipeline, tmp_path, student_first):
    teacher = LoRATeacher(tiny.expert(tmp_path, tiny_pipeline))
    join = [lambda: random_student(fresh.network), lambda: teacher.attach(fresh)]
    for attach_one in join if student_first else join[::-1]:
        attach_one()
    assert {name.rsplit(".", 2)[-2] for name in trainable_names(fresh.network)} == {"student"}
    target = teacher.velocity(*state)
    assert not target.requires_grad
    (fresh.velocity(*state, adapter="student") - target).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(fresh.network, "student"))
    assert {name for name, p in fresh.network.named_parameters() if p.grad is not None} == trainable_names(
        fresh.network
    )


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD], ids=["same targets", "other targets"])
def test_checkpointed_activations_give_the_same_gradients_beside_a_teacher(tiny_pipeline, state, tmp_path, targets):
    """They are recomputed at backward, when it must again be the student that runs."""
    teacher, gradients = LoRATeacher(tiny.expert(tmp_path, tiny_pipeline, targets=targets), guidance_scale=2.0), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        ours = loaded(tiny_pipeline, activation_checkpointing=checkpointing)
        assert ours.network.is_gradient_checkpointing is checkpointing
        random_student(ours.network)
        teacher.attach(ours)
        velocity = ours.velocity(*state, adapter="student", guidance_scale=3.0)
        (velocity - teacher.velocity(*state)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter_parameters(ours.network, "student")]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_adapters_stay_float32_on_a_bfloat16_backbone(tiny_pipeline, state, tmp_path):
    ours = loaded(tiny_pipeline, dtype="bfloat16")
    teacher = LoRATeacher(tiny.expert(tmp_path, tiny_pipeline))
    add_adapter(ours.network, "student", LoRASpec())
    teacher.attach(ours)
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in ours.network.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    x, sigma, _ = state
    for velocity in (
        ours.velocity(x, sigma, ours.encode(TEXTS), "student"),
        teacher.velocity(x, sigma, ours.encode(TEXTS)),
    ):
        assert velocity.dtype == torch.float32
    assert ours.decode(x).dtype == torch.float32


def test_pictures_are_the_same_decoded_a_few_at_a_time(base, monkeypatch):
    latents, sizes = torch.randn(5, *base.latent_shape()), []
    whole, own = base.decode(latents), type(base).pixels
    monkeypatch.setattr(type(base), "pixels", lambda self, *at: sizes.append(len(at[1])) or own(self, *at))
    monkeypatch.setattr("flowopd.models.pipeline.DECODED_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(base.decode(latents), whole, rtol=0, atol=1e-6)
    assert sizes == [2, 2, 1]
