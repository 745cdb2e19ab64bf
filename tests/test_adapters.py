"""The laws of adapters: what is read acts as it does in stock peft, or is refused; what is written acts alike."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, ZImagePipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from jsonargparse import ArgumentParser
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import loaded

from flowopd.models import AdapterSource, LoRASpec, Merge
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.models.adapters.files import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, read_adapter, save_adapter
from flowopd.models.adapters.layouts import PEFT, find_factors
from flowopd.models.adapters.lora import (
    ATTENTION,
    Adapter,
    Factors,
    adapter_names,
    adapter_parameters,
    add_adapter,
    attach,
    take_adapter,
)
from flowopd.preflight.shapes import adapter_spec
from flowopd.teachers import LoRATeacher
from flowopd.training import GRPOTeacher, OPDStudent, TeacherCallback

FEED_FORWARD = ("attn.to_q", "ff.net.0.proj", "ff.net.2")
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def fresh(tiny_pipeline):
    """A backbone of its own."""
    return loaded(tiny_pipeline)


@pytest.fixture(scope="module")
def state(tiny_pipeline):
    """Arguments of a velocity."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    return x, torch.tensor([1.0, 0.3]), loaded(tiny_pipeline).encode(["red 1", "blue 2"])


def stock_velocity(transformer, state):
    x, sigma, cond = state
    with torch.no_grad():
        return transformer.eval()(x, cond.tokens, cond.pooled, 1000 * sigma, return_dict=False)[0]


def edit(folder: str, tensors=None, **config) -> str:
    """Change an adapter's config by key, and its tensors by a function of all of them."""
    content = json.loads((Path(folder) / CONFIG).read_text())
    (Path(folder) / CONFIG).write_text(json.dumps(content | config))
    if tensors is not None:
        changed = tensors(load_file(Path(folder) / WEIGHTS))
        save_file({key: value.contiguous() for key, value in changed.items()}, Path(folder) / WEIGHTS)
    return folder


def base_tensors(network) -> dict:
    """The network's own tensors, whatever adapters lie around them."""
    own = {key: value for key, value in network.state_dict().items() if ".lora_" not in key}
    return {key.replace(".base_layer.", "."): value.clone() for key, value in own.items()}


# ------------------------------------------------------------------------------------------- what acts as in stock peft

KINDS = {  # options of tiny.expert, and changes of the config by hand
    "usual": ({}, {}),
    "rank 1": ({"rank": 1, "alpha": 5, "targets": FEED_FORWARD}, {}),
    "targets by pattern": ({"rank": 7, "alpha": 7, "targets": r".*\.attn2?\.to_[qv]"}, {}),
    "all linear": ({"targets": "all-linear"}, {}),
    "all linear, as written by hand": ({"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "a convolution": ({"targets": ("proj", "proj_out")}, {}),
    "rslora": ({"use_rslora": True}, {}),
    "alpha by module": ({"alpha_pattern": {"to_q": 32, r"^transformer_blocks\.1\.attn\.to_k": 0.5}}, {}),
    "rank by module": ({"rank_pattern": {"to_q": 2, "add_q_proj": 6}}, {}),
    "all by module": (
        {
            "use_rslora": True,
            "rank_pattern": {"to_q": 3},
            "alpha_pattern": {"to_q": 5, "net.2": 1},
            "targets": FEED_FORWARD,
        },
        {},
    ),
    "excluded modules": ({"exclude_modules": ["attn.to_k"]}, {}),
    "some layers": ({"layers_to_transform": [1], "layers_pattern": "transformer_blocks"}, {}),
    "a fraction of alpha": ({}, {"lora_alpha": 0.3}),
    "a negative alpha": ({}, {"lora_alpha": -3}),
    "dropout": ({"lora_dropout": 0.5}, {}),
    "fan in, fan out": ({}, {"fan_in_fan_out": True}),
    "from a Gaussian": ({"init_lora_weights": "gaussian"}, {}),
    "from anywhere": ({"init_lora_weights": False}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
    "eva": ({}, {"init_lora_weights": "eva"}),
    "defaults left out": ({}, {"unheard_of": None, "bias": "none", "modules_to_save": []}),
}
KNOWN = ("fan_in_fan_out is set to True", "`init_lora_weights` is 'eva'", "Unexpected keyword arguments")  # peft warns


def every_kind(law):
    """A law of everything that is read, where peft may say what it thinks of it."""
    for words in KNOWN:
        law = pytest.mark.filterwarnings(f"ignore:{words}")(law)
    return law


@pytest.fixture(scope="module", params=KINDS)
def expert(request, tiny_pipeline, tmp_path_factory):
    """An adapter of every kind; read-only."""
    options, changes = KINDS[request.param]
    return edit(tiny.expert(tmp_path_factory.mktemp("kinds") / "expert", tiny_pipeline, **options), **changes)


@pytest.fixture(scope="module")
def expected(expert, tiny_pipeline, state):
    """What stock peft makes of it."""
    return stock_velocity(PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), expert), state)


@every_kind
def test_what_is_read_acts_as_in_stock_peft_in_every_role(fresh, state, expert, expected):
    teacher = LoRATeacher(expert)
    teacher.attach(fresh)
    attach(fresh.network, "start", AdapterSource(expert).adapter(), trainable=True)
    attach(fresh.network, "merge", Merge([expert], weights=[1.0]).adapter())
    velocities = [teacher.velocity(*state), *(fresh.velocity(*state, adapter=name) for name in ("start", "merge"))]
    for velocity in velocities:
        torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
        assert torch.equal(velocity, velocities[0])


@every_kind
def test_attaching_leaves_the_base_as_it_is(fresh, state, expert, expected):
    before, velocity = base_tensors(fresh.network), fresh.velocity(*state)
    LoRATeacher(expert).attach(fresh)
    after = base_tensors(fresh.network)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert torch.equal(fresh.velocity(*state), velocity)
    assert not torch.equal(expected, velocity)


@every_kind
def test_what_is_written_acts_alike_in_peft_and_diffusers(state, expert, expected, tiny_pipeline, tmp_path):
    export_adapter(read_adapter(expert), tmp_path / "out", ModelCard("org/base", "OPDStudent"))
    peft = PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), str(tmp_path / "out"))
    torch.testing.assert_close(stock_velocity(peft, state), expected, rtol=0, atol=1e-6)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=DIFFUSERS_WEIGHTS)
    torch.testing.assert_close(stock_velocity(pipe.transformer, state), expected, rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("name", [WEIGHTS, DIFFUSERS_WEIGHTS])
def test_what_is_written_acts_alike_in_comfyui(expert, tmp_path, name):
    adapter = read_adapter(expert)
    export_adapter(adapter, tmp_path / "out", ModelCard("org/base", "OPDStudent"))
    changes = comfyui(load_file(tmp_path / "out" / name))
    assert changes.keys() == adapter.parts.keys()
    for module, part in adapter.parts.items():
        torch.testing.assert_close(changes[module], part.change(), rtol=0, atol=1e-6)


def comfyui(tensors) -> dict:
    """ComfyUI's rule: ΔW = alpha tensor / rank · B·A, or B·A where there is none; it knows no config."""
    changes = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            written = key.removesuffix(".lora_A.weight")
            scale = float(tensors[f"{written}.alpha"]) / len(a) if f"{written}.alpha" in tensors else 1.0
            module = written.removeprefix("base_model.model.").removeprefix("transformer.")
            changes[module] = scale * tensors[f"{written}.lora_B.weight"].flatten(1) @ a.flatten(1)
    return changes


@every_kind
def test_an_adapter_survives_the_disk(expert, tmp_path):
    adapter = read_adapter(expert)
    save_adapter(adapter, tmp_path / "again")
    again = read_adapter(str(tmp_path / "again"))
    assert again.fingerprint() == adapter.fingerprint()
    for module, part in again.parts.items():
        torch.testing.assert_close(part.change(), adapter.parts[module].change(), rtol=1e-6, atol=0)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("alpha", [8, 4, 2, 64, 7, 5])
def test_a_start_from_what_was_written_trains_as_if_it_had_not_been(fresh, tmp_path, alpha):
    """The scale is folded into B for other readers, but a step along the gradient of B depends on it."""
    adapter = random_student(fresh.network, LoRASpec(rank=4, alpha=alpha))
    save_adapter(adapter, tmp_path)
    again = read_adapter(str(tmp_path))
    for module, part in again.parts.items():
        ours = adapter.parts[module]
        assert 0.7 < part.scale / ours.scale < 1.5
        if alpha in (2, 4, 8, 64):
            assert part.scale == ours.scale
            assert torch.equal(part.b, ours.b)
        assert torch.equal(part.a, ours.a)


def random_student(network, spec=None) -> Adapter:
    """Put a trainable adapter "student" with random factors on the network."""
    add_adapter(network, "student", spec or LoRASpec(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in adapter_parameters(network, "student"):
            parameter.normal_(std=0.1)
    return take_adapter(network, "student")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_acts_as_the_pissa(fresh, state, tiny_pipeline, tmp_path):
    """The way out that its refusal names."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ATTENTION), init_lora_weights="pissa")
    model = get_peft_model(tiny.stock_transformer(tiny_pipeline), config)
    model.save_pretrained(str(tmp_path / "initial"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    attach(fresh.network, "pissa", read_adapter(str(tmp_path / "out")))
    torch.testing.assert_close(fresh.velocity(*state, "pissa"), stock_velocity(model, state), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- what is refused


def with_key(key: str, value=None):
    return lambda tensors: tensors | {PEFT + key: torch.ones(16) if value is None else value}


def without(ending: str):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(ending)}


def spoiled(value: float):
    def spoil(tensors):
        tensors[f"{PEFT}{TO_Q}.lora_B.weight"][0, 0] = value
        return tensors

    return spoil


AGAIN = r"; train it again without, or teach with its merged model \(peft's merge_and_unload\) as a FullTeacher$"
MOVED = "which moves the base, .*make a plain LoRA of it by peft's save_pretrained"
REFUSED = {  # options of tiny.expert, changes of the config, changes of the tensors, and the sentence
    "pissa": ({"init_lora_weights": "pissa"}, {}, None, f"was initialised by pissa, {MOVED}"),
    "pissa, quick": ({}, {"init_lora_weights": "pissa_niter_4"}, None, f"was initialised by pissa_niter_4, {MOVED}"),
    "olora": ({"init_lora_weights": "olora"}, {}, None, f"was initialised by olora, {MOVED}"),
    "corda": ({}, {"init_lora_weights": "corda"}, None, f"was initialised by corda, {MOVED}"),
    "LoRA-GA": ({}, {"init_lora_weights": "lora_ga"}, None, f"was initialised by lora_ga, {MOVED}"),
    "loftq": ({}, {"init_lora_weights": "loftq"}, None, f"was initialised by loftq, which may change the base{AGAIN}"),
    "an unknown start": ({}, {"init_lora_weights": "new"}, None, "was initialised by new, which may change the base"),
    "DoRA": ({"use_dora": True}, {}, None, f"is a DoRA, whose trained magnitudes are not of the form B·A{AGAIN}"),
    "DoRA, unsaid": ({"use_dora": True}, {"use_dora": False}, None, f"is a DoRA, .*{AGAIN}"),
    "biases": ({"bias": "lora_only"}, {}, None, rf"has trained biases \(bias\){AGAIN}"),
    "all biases": ({"bias": "all"}, {}, None, rf"has trained biases \(bias\){AGAIN}"),
    "biases, unsaid": ({"bias": "lora_only"}, {"bias": "none"}, None, f"has trained biases .*{AGAIN}"),
    "biases of B": ({"lora_bias": True}, {}, None, rf"has trained biases of its B factors \(lora_bias\){AGAIN}"),
    "whole modules": ({"modules_to_save": ["proj_out"]}, {}, None, f"has whole trained modules .*{AGAIN}"),
    "whole modules, unsaid": (
        {"modules_to_save": ["proj_out"]},
        {"modules_to_save": None},
        None,
        f"has (whole trained modules|trained biases) .*{AGAIN}",
    ),
    "aLoRA": ({}, {"alora_invocation_tokens": [1]}, None, "uses alora_invocation_tokens, which is more than a plain"),
    "parameters": ({}, {"target_parameters": ["pos_embed"]}, None, "uses target_parameters, which is more"),
    "from the future": ({}, {"use_zora": True}, None, "uses use_zora, which is more than a plain LoRA"),
    "IA3": ({}, {"peft_type": "IA3"}, None, "is of peft's type IA3, not LORA; convert it with peft's save_as_lora"),
    "no alpha": ({}, {"lora_alpha": None}, None, "has lora_alpha null in its config; expected a number"),
    "a word for alpha": ({}, {"lora_alpha": "8"}, None, 'has lora_alpha "8" in its config; expected a number'),
    "NaN for alpha": ({}, {"lora_alpha": float("nan")}, None, "has lora_alpha NaN in its config; expected a number"),
    "no rank": ({}, {"r": None}, None, "has r null in its config; expected a number, and ranks of 1 or more"),
    "rank 0": ({}, {"r": 0}, None, "has r 0 in its config; expected a number, and ranks of 1 or more"),
    "half a rank": ({}, {"r": 3.5}, None, "has r 3.5 in its config; expected a number, and ranks of 1 or more"),
    "another rank": (
        {},
        {"r": 16},
        None,
        "has rank 16 in its config, but rank 4 in the tensors of .*; correct the config",
    ),
    "another rank somewhere": (
        {},
        {"rank_pattern": {"to_q": 2}},
        None,
        r"has rank 2 in .*rank 4 in the tensors of .*to_q",
    ),
    "no alpha somewhere": ({}, {"alpha_pattern": {"to_q": None}}, None, "has an alpha of to_q null in its config"),
    "no targets": ({}, {"target_modules": None}, None, "has target_modules None in its config; expected names"),
    "other targets": ({}, {"target_modules": ["to_q"]}, None, "has tensors of .*, which its config does not target"),
    "a broken pattern": ({}, {"target_modules": "(to_q"}, None, "has a config that peft does not accept"),
    "half a module": (
        {},
        {},
        without(f"{TO_Q}.lora_B.weight"),
        f"lacks the factor B of .*{TO_Q}; the file is incomplete",
    ),
    "nothing": ({}, {}, lambda tensors: {}, "has no tensors of a LoRA"),
    "NaN": ({}, {}, spoiled(float("nan")), f"has a NaN or an infinity in factor B of {TO_Q}; its training diverged"),
    "infinity": ({}, {}, spoiled(float("inf")), f"has a NaN or an infinity in factor B of {TO_Q}"),
    "integers": (
        {},
        {},
        lambda tensors: {k: v.to(torch.int8) for k, v in tensors.items()},
        "has torch.int8 numbers in",
    ),
    "two ranks": ({}, {}, with_key(f"{TO_Q}.lora_B.weight", torch.ones(16, 3)), r"has factors of shape \(4, 16\) and"),
    "a foreign key": (
        {},
        {},
        with_key("extra.thing"),
        "has base_model.model.extra.thing, which is no factor of a LoRA",
    ),
    "LoHa": ({}, {}, with_key("proj_out.hada_w1_a"), f"is another kind of adapter .*{AGAIN}"),
    "text encoders": (
        {},
        {},
        lambda t: t | {"text_encoder.a.lora_A.weight": torch.ones(2)},
        "adapts the text encoders too",
    ),
    "strength twice": ({}, {}, with_key(f"{TO_Q}.alpha", torch.tensor(4.0)), "says its strength twice"),
    "two adapters": (
        {},
        {},
        lambda t: {k.replace("A.w", f"A.{'ab'['0.attn.to_q' in k]}.w"): v for k, v in t.items()},
        r"has several adapters \(None, a, b\) in one file",
    ),
}


@pytest.fixture
def refused(request, tiny_pipeline, tmp_path):
    options, changes, tensors, sentence = REFUSED[request.param]
    return edit(tiny.expert(tmp_path / "refused", tiny_pipeline, **options), tensors, **changes), sentence


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")  # peft, of biases of B that it saves
@pytest.mark.parametrize("refused", REFUSED, indirect=True)
def test_what_is_not_a_plain_lora_is_refused_in_one_sentence_and_touches_nothing(fresh, refused):
    folder, sentence = refused
    before = base_tensors(fresh.network)
    for read in (read_adapter, lambda path: Merge([path]).adapter(), lambda path: LoRATeacher(path).attach(fresh)):
        with pytest.raises(ValueError, match=rf"^adapter '.*refused' {sentence}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    assert adapter_names(fresh.network) == set()
    assert all(torch.equal(before[key], value) for key, value in base_tensors(fresh.network).items())


ODD = [
    None,
    True,
    False,
    0,
    -1,
    2.5,
    1e300,
    10**40,
    "",
    "x",
    "(",
    [],
    ["x"],
    [None],
    {},
    {"x": "y"},
    {"(": 1},
    {"to_q": 2},
]


@pytest.mark.parametrize("key", sorted(LoraConfig(target_modules=["x"]).to_dict()))
def test_whatever_a_config_says_it_is_read_or_refused(tiny_pipeline, tmp_path_factory, key):
    folder = tmp_path_factory.getbasetemp() / "odd"
    if not folder.is_dir():
        tiny.expert(folder, tiny_pipeline)
    before = (folder / CONFIG).read_text()
    for value in ODD:
        edit(str(folder), **{key: value})
        try:
            assert len(read_adapter(str(folder)).parts) == 15
        except ValueError as error:
            told = str(error)
        else:
            told = f"adapter '{folder}' is read"
        assert told.startswith(f"adapter '{folder}' ")
        assert "\n" not in told
        (folder / CONFIG).write_text(before)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "null", "3"])
def test_a_config_that_is_none_is_refused(tiny_pipeline, tmp_path, text):
    (Path(tiny.expert(tmp_path, tiny_pipeline)) / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"has (no readable|a \w+ for) {CONFIG}"):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (without("0.attn.to_q.lora_A.weight"), None),
        (
            lambda t: {k: v for k, v in t.items() if "0.attn.to_q" not in k},
            f"{TO_Q} is targeted by its config, but .*$",
        ),
        (lambda t: {k: v for k, v in t.items() if "0.attn" not in k}, r".* \(and 7 more\)$"),
        (
            with_key(f"{TO_Q}.lora_A.weight", torch.ones(4, 3)),
            rf"{TO_Q}.lora_A has shape \(., 3\) instead of \(., 16\)$",
        ),
        (
            lambda t: {k.replace("blocks.1", "blocks.7"): v for k, v in t.items()},
            r"transformer_blocks.7.\S+ is not part of this network.* \(and 13 more\)$",
        ),
    ],
    ids=["half", "missing", "several missing", "mis-shaped", "foreign"],
)
@pytest.mark.parametrize("role", ["teacher", "merge"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(fresh, tiny_pipeline, tmp_path, changed, fault, role):
    folder = edit(tiny.expert(tmp_path, tiny_pipeline), changed)
    fault = f"adapter '.*' does not fit this network: {fault}" if fault else "lacks the factor A of"
    attach_it = {
        "teacher": lambda: LoRATeacher(folder).attach(fresh),
        "merge": lambda: attach(fresh.network, "student", Merge([folder, folder]).adapter()),
    }
    with pytest.raises(ValueError, match=fault):
        attach_it[role]()
    assert adapter_names(fresh.network) == set()


@pytest.mark.parametrize("zero", ["std", "alpha"])
def test_a_teacher_equal_to_the_base_is_refused(fresh, tiny_pipeline, tmp_path, zero):
    teacher = LoRATeacher(tiny.expert(tmp_path, tiny_pipeline, **{zero: 0}))
    with pytest.raises(ValueError, match=r"changes nothing: .* equals the base model"):
        teacher.attach(fresh)


# ----------------------------------------------------------------------------------------------- layouts of other tools


def renamed(rename, alpha: float | None = 8.0):
    """A file of another tool: keys by ``rename(module, letter)``, with an alpha beside every module or none."""

    def write(adapter: Adapter, file: Path) -> float:
        tensors = {}
        for module, part in adapter.parts.items():
            tensors |= {rename(module, "A"): part.a, rename(module, "B"): part.b}
            if alpha is not None:
                tensors[rename(module, "alpha")] = torch.tensor(alpha)
        save_file(tensors, file)
        return 1.0 if alpha is None else alpha / 4

    return write


def flat(prefix: str):
    names = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}
    return lambda module, letter: f"{prefix}{module.replace('.', '_')}.{names[letter]}"


def dotted(prefix: str, a: str, b: str):
    return lambda module, letter: f"{prefix}{module}.{ {'A': a, 'B': b, 'alpha': 'alpha'}[letter] }"


def diffusers_file(adapter: Adapter, file: Path, **config) -> float:
    metadata = {"transformer_lora_adapter_metadata": config} if config else {}
    StableDiffusion3Pipeline.save_lora_weights(str(file.parent), transformer_lora_layers=adapter.tensors, **metadata)
    (file.parent / DIFFUSERS_WEIGHTS).rename(file)
    return config["lora_alpha"] / 4 if config else 1.0


def diffusers_with_metadata(adapter: Adapter, file: Path) -> float:
    return diffusers_file(adapter, file, r=4, lora_alpha=14, target_modules=list(ATTENTION), rank_pattern={})


LAYOUTS = {
    "diffusers": diffusers_file,
    "diffusers, with metadata": diffusers_with_metadata,
    "diffusers, with alpha": renamed(dotted("transformer.", "lora_A.weight", "lora_B.weight")),
    "diffusers of old": renamed(dotted("transformer.", "lora.down.weight", "lora.up.weight"), None),
    "named by peft": renamed(dotted("", "lora_A.default.weight", "lora_B.default.weight"), None),
    "named by peft, with alpha": renamed(dotted(PEFT, "lora_A.default.weight", "lora_B.default.weight"), 3.0),
    "kohya": renamed(flat("lora_unet_")),
    "kohya, without alpha": renamed(flat("lora_unet_"), None),
    "OneTrainer": renamed(flat("lora_transformer_"), 1.0),
    "LyCORIS": renamed(flat("lycoris_"), 2.0),
    "ComfyUI": renamed(dotted("diffusion_model.", "lora_down.weight", "lora_up.weight"), None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_other_tools_write_is_read_at_its_strength(fresh, tiny_pipeline, tmp_path, layout):
    adapter = read_adapter(tiny.expert(tmp_path / "expert", tiny_pipeline))
    scale = LAYOUTS[layout](adapter, tmp_path / "other.safetensors")
    other = read_adapter(str(tmp_path / "other.safetensors"))
    assert other.parts.keys() == adapter.parts.keys()
    for module, part in adapter.parts.items():
        assert torch.equal(other.parts[module].a, part.a)
        assert torch.equal(other.parts[module].b, part.b)
        assert other.parts[module].scale == scale
    save_adapter(Adapter({m: Factors(p.a, p.b, scale) for m, p in adapter.parts.items()}), tmp_path / "ours")
    assert read_adapter(str(tmp_path / "ours")).fingerprint() == other.fingerprint()
    LoRATeacher(str(tmp_path / "other.safetensors")).attach(fresh)


@pytest.mark.parametrize("layout", ["diffusers", "diffusers, with metadata", "diffusers of old"])
def test_what_is_read_acts_as_in_stock_diffusers(fresh, state, tiny_pipeline, tmp_path, layout):
    adapter = read_adapter(tiny.expert(tmp_path / "expert", tiny_pipeline, rank_pattern={}))
    LAYOUTS[layout](adapter, tmp_path / "other.safetensors")
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(str(tmp_path), weight_name="other.safetensors")
    attach(fresh.network, "teacher", read_adapter(str(tmp_path / "other.safetensors")))
    ours = fresh.velocity(*state, adapter="teacher")
    torch.testing.assert_close(ours, stock_velocity(pipe.transformer, state), rtol=0, atol=1e-6)


def original_checkpoint(width: int = 8, tokens: int = 12, pooled: int = 6) -> dict:
    """Shapes of an SD3 in the original names: two blocks, the first with a second attention."""
    shapes = {
        "x_embedder.proj": (width, 4, 2, 2),
        "context_embedder": (width, tokens),
        "final_layer.linear": (16, width),
    }
    shapes |= {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, pooled),
    }
    shapes |= {"y_embedder.mlp.2": (width, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for i, (x, context) in enumerate([(9, 6), (6, 2)]):
        for side, modulations in (("x", x), ("context", context)):
            block = f"joint_blocks.{i}.{side}_block."
            shapes |= {
                f"{block}attn.qkv": (3 * width, width),
                f"{block}adaLN_modulation.1": (modulations * width, width),
            }
            if (side, i) != ("context", 1):
                shapes |= {f"{block}attn.proj": (width, width)}
                shapes |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
    shapes |= {"joint_blocks.0.x_block.attn2.qkv": (24, width), "joint_blocks.0.x_block.attn2.proj": (width, width)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def by_diffusers(weights: dict) -> dict:
    """Weights by diffusers' names, by its own converter."""
    biases = {f"{name}.bias": torch.zeros(len(value)) for name, value in weights.items()}
    checkpoint = {f"{name}.weight": value for name, value in weights.items()} | biases | {"pos_embed": torch.zeros(1)}
    return convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)


@pytest.mark.parametrize(
    "rename", [flat("lora_unet_"), dotted("diffusion_model.", "lora_down.weight", "lora_up.weight")]
)
def test_original_names_are_converted_as_diffusers_converts_checkpoints(tmp_path, rename):
    """kohya's scripts and ComfyUI fuse q, k and v, and order (shift, scale) of an output the other way round."""
    base = original_checkpoint()
    parts = {
        m: Factors(torch.randn(2, *w.shape[1:]), torch.randn(len(w), 2, *[1] * (w.dim() - 2)), 1)
        for m, w in base.items()
    }
    tensors = {rename(module, "A"): part.a for module, part in parts.items()}
    tensors |= {rename(module, "B"): part.b for module, part in parts.items()}
    tensors |= {rename(module, "alpha"): torch.tensor(3.0) for module in parts}
    save_file(tensors, tmp_path / "kohya.safetensors")
    ours = read_adapter(str(tmp_path / "kohya.safetensors"))
    changed = by_diffusers({m: w + 1.5 * parts[m].change().reshape(w.shape) for m, w in base.items()})
    before = by_diffusers(base)
    assert {f"{module}.weight" for module in ours.parts} == {key for key in before if key.endswith(".weight")}
    for module, part in ours.parts.items():
        difference = changed[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(part.change().reshape(difference.shape), difference, rtol=0, atol=1e-5)
    save_adapter(ours, tmp_path)
    assert read_adapter(str(tmp_path)).fingerprint() == ours.fingerprint()


WIDTH = 3072  # of FLUX.1, which diffusers' converter knows by heart
STREAMS = {
    f"{side}_{part}": shape
    for side in ("img", "txt")
    for part, shape in {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}.items()
}
ORIGINAL = {  # shapes of modules in the original names, by family
    "flux": {f"double_blocks.1.{name}": shape for name, shape in STREAMS.items()}
    | {f"double_blocks.1.{side}_mlp.0": (4 * WIDTH, WIDTH) for side in ("img", "txt")}
    | {f"double_blocks.1.{side}_mlp.2": (WIDTH, 4 * WIDTH) for side in ("img", "txt")}
    | {f"double_blocks.1.{side}_mod.lin": (6 * WIDTH, WIDTH) for side in ("img", "txt")}
    | {"single_blocks.3.linear1": (7 * WIDTH, WIDTH), "single_blocks.3.linear2": (WIDTH, 5 * WIDTH)}
    | {"single_blocks.3.modulation.lin": (3 * WIDTH, WIDTH)},
    "flux 2": {f"double_blocks.1.{name}": shape for name, shape in STREAMS.items()}
    | {f"double_blocks.1.{side}_mlp.0": (6 * WIDTH, WIDTH) for side in ("img", "txt")}
    | {f"double_blocks.1.{side}_mlp.2": (WIDTH, 3 * WIDTH) for side in ("img", "txt")}
    | {"single_blocks.3.linear1": (9 * WIDTH, WIDTH), "single_blocks.3.linear2": (WIDTH, 4 * WIDTH)},
    "z-image": {f"{place}.1.attention.to_{letter}": (8, 8) for place in ("layers", "noise_refiner") for letter in "qkv"}
    | {"layers.0.attention.to_out.0": (8, 8), "context_refiner.0.feed_forward.w2": (8, 24)},
    "qwen": {f"transformer_blocks.0.attn.{name}": (8, 8) for name in ("to_q", "add_k_proj", "to_out.0", "to_add_out")}
    | {"transformer_blocks.0.img_mlp.net.0.proj": (32, 8), "transformer_blocks.0.txt_mod.1": (48, 8)},
}
PIPELINES = {"flux": FluxPipeline, "flux 2": Flux2KleinPipeline, "z-image": ZImagePipeline, "qwen": QwenImagePipeline}


@pytest.mark.parametrize("family", ORIGINAL)
def test_adapters_of_further_families_are_converted_as_diffusers_does(tmp_path, family):
    tensors, name = {}, flat("lora_unet_")
    for module, (out, into) in ORIGINAL[family].items():
        tensors |= {name(module, "A"): torch.randn(2, into), name(module, "B"): torch.randn(out, 2)}
        tensors[name(module, "alpha")] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = find_factors(PIPELINES[family].lora_state_dict(dict(tensors)))
    ours = read_adapter(str(tmp_path / "kohya.safetensors")).parts
    assert ours.keys() == theirs.keys()
    for module, part in ours.items():
        torch.testing.assert_close(part.scale * part.b, 4.0 * part.b)
        torch.testing.assert_close(4 * part.b[:64] @ part.a[:, :64], theirs[module].b[:64] @ theirs[module].a[:, :64])


@pytest.mark.parametrize("family", ["flux", "flux 2"])
def test_original_names_with_dots_are_those_without(tmp_path, family):
    """As ComfyUI and ai-toolkit write them."""
    rows = {module: (torch.randn(1, into), torch.randn(out, 1)) for module, (out, into) in ORIGINAL[family].items()}
    files = {"flat": flat("lora_unet_"), "dotted": dotted("diffusion_model.", "lora_A.weight", "lora_B.weight")}
    for file, rename in files.items():
        named = {rename(module, "A"): a for module, (a, _) in rows.items()}
        named |= {rename(module, "B"): b for module, (_, b) in rows.items()}
        save_file(named, tmp_path / f"{file}.safetensors")
    flat_, dotted_ = (read_adapter(str(tmp_path / f"{file}.safetensors")) for file in files)
    assert flat_.fingerprint() == dotted_.fingerprint()


def test_fused_projections_of_z_image_are_three_modules(tmp_path):
    a, b = torch.randn(2, 8), torch.randn(24, 2)
    name = "diffusion_model.layers.0.attention."
    out = {f"{name}out.lora_A.weight": a.clone(), f"{name}out.lora_B.weight": b[:8].clone()}
    save_file({f"{name}qkv.lora_A.weight": a, f"{name}qkv.lora_B.weight": b, **out}, tmp_path / "comfy.safetensors")
    parts = read_adapter(str(tmp_path / "comfy.safetensors")).parts
    rows = {module.removeprefix("layers.0.attention."): part.b for module, part in parts.items()}
    wanted = dict(zip(("to_q", "to_k", "to_v", "to_out.0"), (*b.chunk(3), b[:8]), strict=True))
    assert rows.keys() == wanted.keys()
    assert all(torch.equal(rows[module], part) for module, part in wanted.items())


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "lacks the factor B of lora_unet_down_blocks_0"),
        (
            {"lora_unet_x.lora_down.weight": (4, 8), "lora_unet_x.lora_up.weight": (8, 4)},
            "has lora_unet_x, which is no module",
        ),
        (
            {
                "diffusion_model.joint_blocks.0.x.lora_down.weight": (4, 8),
                "diffusion_model.joint_blocks.0.x.lora_up.weight": (8, 4),
            },
            "has diffusion_model.joint_blocks.0.x, which is no module of a transformer that is known",
        ),
        ({"a.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4), "a.alpha": (2,)}, "has no finite number in a.alpha"),
        ({"a.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4), "b.alpha": (1,)}, "lacks the factor A of b"),
        (
            {"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.lora_mid.weight": (1,)},
            "is another kind of adapter",
        ),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.dora_scale": (1,)}, "is a DoRA"),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.diff_b": (1,)}, "has trained biases"),
        ({"lora_te1_x.lora_down.weight": (4, 8)}, "adapts the text encoders too"),
        (
            {f"{p}.{n}.weight": s for p in ("a", "transformer.a") for n, s in (("lora_A", (4, 8)), ("lora_B", (8, 4)))},
            "has a twice, under different names",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_other_tools_write_beside_a_lora_is_refused(tmp_path, tensors, sentence):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"^adapter '{file}' {sentence}"):
        read_adapter(str(file))


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_knows_every_tensor_and_the_scale_of_every_module(tiny_pipeline, tmp_path):
    kinds = [{}, {"seed": 2}, {"alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"0.attn.to_q": 9}}]
    kinds += [{"rank_pattern": {"to_q": 2}}, {"targets": ["attn.to_q"]}]
    folders = [tiny.expert(tmp_path / str(i), tiny_pipeline, **kind) for i, kind in enumerate(kinds)]
    prints = [read_adapter(folder).fingerprint() for folder in folders]
    assert len(set(prints)) == len(kinds)
    assert read_adapter(tiny.expert(tmp_path / "again", tiny_pipeline)).fingerprint() == prints[0]


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"to_q": 1}}, {"lora_alpha": 9}])
def test_teachers_of_equal_tensors_and_different_strength_are_two(fresh, state, tiny_pipeline, tmp_path, change):
    first = tiny.expert(tmp_path / "first", tiny_pipeline)
    second = edit(shutil.copytree(first, tmp_path / "second"), **change)
    callbacks = [TeacherCallback(["red"], LoRATeacher(str(folder))) for folder in (first, second)]
    for callback in callbacks:
        callback.role.teacher.attach(fresh)
    assert len(adapter_names(fresh.network)) == 2
    assert not torch.equal(*(callback.role.teacher.velocity(*state) for callback in callbacks))
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        callbacks[1].load_state_dict(callbacks[0].state_dict())


# --------------------------------------------------------------------------------------------------- where adapters are


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_an_incomplete_adapter_folder_is_named(tiny_pipeline, tmp_path, missing):
    tiny.expert(tmp_path, tiny_pipeline)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}"):
        read_adapter(str(tmp_path))


def test_a_truncated_file_is_named(tiny_pipeline, tmp_path):
    tiny.expert(tmp_path, tiny_pipeline)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a readable safetensors file"):
        read_adapter(str(tmp_path))


def test_an_adapter_is_a_folder_or_a_file_in_it(tiny_pipeline, tmp_path):
    export_adapter(
        read_adapter(tiny.expert(tmp_path / "in", tiny_pipeline)), tmp_path, ModelCard("org/base", "OPDStudent")
    )
    shutil.copytree(tmp_path, tmp_path / "diffusers")
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "diffusers" / name).unlink()
    places = [(tmp_path,), (tmp_path / WEIGHTS,), (tmp_path / DIFFUSERS_WEIGHTS,), (tmp_path / "diffusers",)]
    places += [(tmp_path, f"diffusers/{DIFFUSERS_WEIGHTS}"), (tmp_path, "in/"), (tmp_path, DIFFUSERS_WEIGHTS)]
    assert len({read_adapter(*map(str, place)).fingerprint() for place in places}) == 1


@pytest.mark.parametrize(
    ("path", "kind", "sentence"),
    [
        ("nowhere.safetensors", FileNotFoundError, r"adapter file '.*nowhere.safetensors' does not exist"),
        ("old.ckpt", ValueError, r"is not a .safetensors file; others may run code when read"),
        ("many", FileNotFoundError, rf"has no {CONFIG}; .*name it: 'step-1.safetensors' or 'step-2.safetensors'"),
        ("pickled", FileNotFoundError, f"has no {WEIGHTS}; .* peft layout, with safe_serialization=True"),
    ],
)
def test_what_is_no_adapter_is_named(tmp_path, path, kind, sentence):
    (tmp_path / "old.ckpt").touch()
    for name in (
        "many/step-1.safetensors",
        "many/step-2.safetensors",
        "pickled/adapter_model.bin",
        f"pickled/{CONFIG}",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(kind, match=sentence):
        read_adapter(str(tmp_path / path))


def test_a_plan_knows_the_shape_of_every_layout(tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path / "peft", tiny_pipeline, rank_pattern={"to_q": 6})
    adapter = read_adapter(folder)
    LAYOUTS["kohya"](adapter, tmp_path / "kohya.safetensors")
    sources = [AdapterSource(folder), AdapterSource(str(tmp_path / "kohya.safetensors"))]
    sources += [AdapterSource(str(tmp_path), "peft"), AdapterSource(str(tmp_path), "kohya.safetensors")]
    for source in sources:
        spec = adapter_spec(source)
        assert spec.rank == 6
        assert set(spec.targets) == set(adapter.parts)
    assert adapter_spec(AdapterSource(str(tmp_path / "nowhere"))) is None
    with pytest.raises(ValueError, match="has lora_alpha null in its config"):
        adapter_spec(AdapterSource(edit(folder, lora_alpha=None)))


@pytest.mark.parametrize("policy", [OPDStudent, GRPOTeacher])
def test_a_start_is_named_as_a_teacher_is(policy):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(policy, "model", instantiate=False, skip={"backbone"})
    source = {"path": "org/name", "subfolder": "OCRTeacher/lora", "revision": "v1"}
    merge = {"class_path": "flowopd.Merge", "init_args": {"adapters": [source, "runs/text/adapter"]}}
    parsed = [parser.parse_object({"model": {"start": start}}) for start in ("a", source, merge)]
    starts = [parser.instantiate_classes(config).model.start for config in parsed]
    assert starts[0] == "a"
    assert starts[1] == starts[2].adapters[0] == LoRATeacher(**source).source


def test_a_student_starts_from_a_subfolder(tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path / "teachers" / "red", tiny_pipeline)
    start = AdapterSource(str(tmp_path / "teachers"), "red")
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=start, lr=0.0)
    tiny.trainer(tmp_path, [TeacherCallback(["red"], LoRATeacher(folder))]).fit(policy, tiny.data())
    assert policy.student().fingerprint() == read_adapter(folder).fingerprint()
