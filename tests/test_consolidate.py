"""The laws of many LoRAs into one: words become a recipe, a fit runs it, and what is left says how near it came."""

import csv
import json
import re
from pathlib import Path

import pytest
import tiny
import tiny_families
import yaml
from diffusers import StableDiffusion3Pipeline

from flowopd.cli.consolidate import task_names
from flowopd.models import AdapterSource, Merge, QwenImageBackbone, SD3Backbone, ZImageBackbone
from flowopd.models.adapters.export import write_diffusers
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, read_adapter
from flowopd.models.families import family_of
from flowopd.preflight import plan as planning
from flowopd.tiles import BASE, TilesPrompts, asset

TASKS = ("composition", "text")
SMALL = {
    "trainer.accelerator": "cpu",
    "data.init_args.evaluation_count": 2,
    "data.init_args.prompts_per_iteration": 4,
    "data.init_args.batch_size": 4,
    "model.init_args.sampler.init_args.num_steps": 3,
    "model.init_args.sampler.init_args.window": "[0,3]",
    "model.init_args.sampler.init_args.eval_steps": 2,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Prompts of both tasks, and the teachers as people have LoRAs: a folder of peft, a file of diffusers."""
    monkeypatch.chdir(tmp_path)
    for task in TASKS:
        texts = {prompt.text for prompt in TilesPrompts(task, split="train").draw(30, seed=0)}
        Path(f"{task}.txt").write_text("\n".join(sorted(texts)))
    write_diffusers(read_adapter(str(asset("teacher_text"))), tmp_path)
    Path(DIFFUSERS_WEIGHTS).rename("letters.safetensors")


LORAS = (str(asset("teacher_composition")), "letters.safetensors")
WORDS = (*LORAS, "--base", "tiles", "--prompts", "composition.txt", "text.txt", "--out", "run")


@pytest.fixture
def recipe(flowopd, capsys):
    """The recipe that words become."""

    def printed(*words: object) -> dict:
        flowopd("consolidate", *words, "--print_config")
        return yaml.safe_load(capsys.readouterr().out)

    return printed


def options(values: dict) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


# -------------------------------------------------------------------------------------------------------------- the run


def test_many_loras_become_one_that_diffusers_draws_with(flowopd, monkeypatch):
    decoded, decode = [], SD3Backbone.decode
    monkeypatch.setattr(SD3Backbone, "decode", lambda self, x: (decoded.append(len(x)), decode(self, x))[1])
    flowopd("consolidate", *WORDS, "--guidance", 1.1, 1.4, "--updates", 2, *options(SMALL))
    with Path("run/results.csv").open() as file:
        rows = {row.pop("model"): row for row in csv.DictReader(file)}
    models = ["base", "lora-teacher_composition", "lora-letters", "cold-start", "student"]
    distances = {f"fixed_kl/{name}" for name in models[1:3]}
    assert list(rows) == models
    assert set(rows["student"]) == {"guidance", *distances}
    assert [float(rows[name]["guidance"]) for name in models] == [1, 1.1, 1.4, 1, 1]
    assert all(float(rows[name][f"fixed_kl/{name}"]) < 1e-6 for name in models[1:3])  # at its own states, by itself
    assert all(float(rows["student"][name]) > 0 for name in distances)
    assert json.loads(Path("run/images/shots/models.json").read_text())["models"] == models
    assert sum(decoded) == (1 + 2 + 4) * 4  # nothing is scored: sheets of four prompts alone, one by one and the last

    adapter = read_adapter("run/adapter")
    assert read_adapter(f"run/adapter/{DIFFUSERS_WEIGHTS}").fingerprint() == adapter.fingerprint()
    assert adapter.fingerprint() != Merge(list(LORAS)).adapter().fingerprint()
    pipe = StableDiffusion3Pipeline.from_pretrained(BASE, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights("run/adapter", weight_name=DIFFUSERS_WEIGHTS)


def test_what_is_printed_is_what_is_run(built, flowopd, capsys):
    flowopd("consolidate", *WORDS, "--print_config")
    Path("printed.yaml").write_text(capsys.readouterr().out)
    run, printed = built("consolidate", *WORDS), built("fit", "--config", "printed.yaml")
    assert run.config.fit.as_dict() == printed.config.fit.as_dict()


def test_words_of_a_fit_come_last_wherever_they_stand(built):
    cli = built("consolidate", "--trainer.max_epochs", 7, *WORDS, "--model.init_args.sampler.init_args.eval_steps=3")
    assert (cli.trainer.max_epochs, cli.model.sampler.eval_steps) == (7, 3)


def test_the_start_is_the_mean_of_what_the_loras_change(built):
    start = built("consolidate", *WORDS, "--scales", 0.5, 2).model.start
    expected = Merge([*LORAS], weights=[0.25, 1.0]).adapter().folded()
    found = start.adapter().folded()
    assert found.parts.keys() == expected.parts.keys()
    for module, part in found.parts.items():
        assert (part.change() - expected.parts[module].change()).abs().max() < 1e-6
    assert built("consolidate", *WORDS, "--rank", 3).model.start.rank == 3


# ---------------------------------------------------------------------------------------------------------------- words


def test_every_lora_has_its_own_prompts_trigger_scale_and_guidance(recipe):
    asked = ("--triggers", "", "sks,", "--scales", 1, 0.8, "--guidance", 1.1, 1.4)
    content = recipe(*WORDS, *asked)
    sources = content["data"]["init_args"]["prompts"]
    assert sources["teacher_composition"]["init_args"] == {"path": "composition.txt", "task": "teacher_composition"}
    assert sources["letters"]["init_args"] == {"path": "text.txt", "task": "letters", "trigger": "sks,"}
    teachers = [one["init_args"] for one in content["trainer"]["callbacks"] if "teacher" in one.get("init_args", {})]
    assert [one["tasks"] for one in teachers] == [["teacher_composition"], ["letters"]]
    assert [one["teacher"]["init_args"] for one in teachers] == [
        {"path": LORAS[0], "guidance_scale": 1.1},
        {"path": LORAS[1], "scale": 0.8, "guidance_scale": 1.4},
    ]
    kinds = {one["class_path"] for one in content["trainer"]["callbacks"]}
    assert "flowopd.RewardCallback" not in kinds


def test_a_lora_of_the_hub_may_be_a_file_at_a_revision(recipe):
    words = ("org/ink", "org/toys/v2/toy.safetensors@main", "./letters.safetensors", "--base", BASE, "--out", "run")
    content = recipe(*words, "--prompts", "text.txt", "--triggers", "ink", "toy", "sign", "--guidance", 1)
    assert content["model"]["init_args"]["start"]["init_args"]["adapters"] == [
        {"path": "org/ink"},
        {"path": "org/toys", "subfolder": "v2/toy.safetensors", "revision": "main"},
        {"path": "./letters.safetensors"},
    ]
    assert list(content["data"]["init_args"]["prompts"]) == ["ink", "toy", "letters"]


def test_names_of_loras_differ_and_can_be_names_of_tasks():
    named = task_names(
        ["a/x.safetensors", "b/x", "runs/x/adapter", "c/pytorch_lora_weights.safetensors", "d/é ü.safetensors"]
    )
    assert named == ["x", "x_2", "x_3", "c", "é_ü"]


MISTAKES = {
    "no base": (
        (*LORAS, "--prompts", "text.txt", "--out", "run"),
        r"these are missing: --base; see flowopd consolidate --help",
    ),
    "one file for all": (
        (*LORAS, "--base", "tiles", "--prompts", "text.txt", "--out", "run"),
        r"one file of prompts for several LoRAs needs --triggers",
    ),
    "too many scales": ((*WORDS, "--scales", "1", "1", "1"), r"--scales has 3 values for 2 LoRAs; give one for each"),
    "scale": ((*WORDS, "--scales", "strong"), r"--scales: invalid float value: 'strong'"),
    "no such file": ((*WORDS[:5], "none.txt", "text.txt", "--out", "run"), r"prompt file 'none.txt' does not exist"),
    "no such LoRA": (("none.safetensors", *WORDS[1:]), r"adapter file 'none.safetensors' does not exist"),
    "no such base": ((*LORAS, "--base", "./none", *WORDS[4:]), r"model folder './none' does not exist"),
    "word of ours": ((*WORDS, "--trigers", "sks"), r"these are not known: --trigers sks; see"),
    "word of a fit": ((*WORDS, "--trainer.max_epoch", "5"), r"no option 'trainer.max_epoch' .*max_epochs"),
    "updates": ((*WORDS, "--updates", "0"), r"updates is 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(mistake, flowopd, capsys):
    words, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        flowopd("consolidate", *words)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowopd: error: ")]
    assert len(said) == 1
    assert re.search(expected, said[0]), said
    assert not Path("run").exists()


# ----------------------------------------------------------------------------------------------------------- strengths


def test_a_scale_is_the_strength_of_a_lora_in_diffusers(tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path / "expert", tiny_pipeline)
    scaled = AdapterSource(folder, scale=-0.6).adapter().folded()
    write_diffusers(read_adapter(folder), tmp_path)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(str(tmp_path), weight_name=DIFFUSERS_WEIGHTS, adapter_name="expert")
    pipe.set_adapters("expert", -0.6)
    for module, part in scaled.parts.items():
        layer = pipe.transformer.get_submodule(module)
        assert (layer.get_delta_weight("expert") - part.change()).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------- families


def test_a_model_is_known_by_its_name_or_by_its_pipeline(tiny_pipeline, tmp_path):
    assert family_of("stabilityai/stable-diffusion-3.5-medium") is SD3Backbone
    assert family_of("Tongyi-MAI/Z-Image") is ZImageBackbone
    assert family_of(tiny_pipeline) is SD3Backbone
    tiny_families.qwen().save_pretrained(tmp_path / "qwen")
    assert family_of(str(tmp_path / "qwen")) is QwenImageBackbone
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ValueError, match=r"is a OtherPipeline; known here are .*StableDiffusion3Pipeline"):
        family_of(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("base", "words"), [("stabilityai/stable-diffusion-3.5-medium", ()), ("Tongyi-MAI/Z-Image", ("--rank", 32))]
)
def test_three_loras_become_one_on_a_card_of_24_gb(base, words, built, monkeypatch):
    """Of the published size, before anything is read; the LoRAs are taken for ones of rank 32."""
    for name in ("count_forwards", "count_evaluation"):  # of which no memory depends
        monkeypatch.setattr(planning, name, lambda *_: {})
    loras = ("org/a", "org/b", "org/c", "--prompts", "text.txt", "--triggers", "x", "y", "z", "--out", "run")
    on_cpu = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    cli = built("consolidate", *loras, "--base", base, *words, *on_cpu)
    planned = planning.plan(cli.model, cli.datamodule, cli.trainer.callbacks, planning.Hardware(autocast=True))
    print(base, planned.peak())
    assert planned.peak() < 24e9


def test_a_base_of_unknown_guidance_asks_for_it(tiny_pipeline, flowopd, capsys):
    with pytest.raises(SystemExit):
        flowopd("consolidate", *LORAS, "--base", tiny_pipeline, *WORDS[4:])
    assert "it is not known at which guidance" in capsys.readouterr().err
