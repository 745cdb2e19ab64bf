"""The laws of configs/sd35: every file parses, builds and runs, with a tiny pipeline in place of the real one."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from flowopd.models import SD3Backbone
from flowopd.models.adapters.files import read_adapter
from flowopd.records import Prompt
from flowopd.training import FlowPolicy

CONFIGS = Path(__file__).parent.parent / "configs" / "sd35"
ABLATIONS = [f"opd+{path.stem}" for path in sorted((CONFIGS / "ablations").glob("*.yaml"))]
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml")) + ABLATIONS
OVERLAYS = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
WANTED = (
    "teacher_geneval teacher_ocr teacher_pickscore teacher_deqa grpo_mix cold_start_merge cold_start_sft opd opd_no_mar"
)
WANTED += " opd_folded opd+sft opd+released opd+paper opd+branches evaluate"
RANKS = {"12gb": 1, "24gb": 1, "1x80gb": 1, "8x80gb_fsdp": 8, "multinode": 16}
STUB = {"class_path": "test_sd35_configs.Redness"}


class Redness:
    """In place of rewards that read weights."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images[:, 0].mean((1, 2))


PUBLISHED = ["jieliu/SD3.5M-FlowGRPO-GenEval", "jieliu/SD3.5M-FlowGRPO-Text", "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix"]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_without_t5) -> str:
    return tiny_pipeline_without_t5


@pytest.fixture(scope="module")
def adapters(pipeline, tmp_path_factory) -> dict[str, str]:
    """A tiny adapter in place of every published one."""
    folder = tmp_path_factory.mktemp("adapters")
    return {path: tiny.expert(folder / str(seed), pipeline, seed, std=0.05) for seed, path in enumerate(PUBLISHED)}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\na house by the sea\n")


@pytest.fixture
def config(pipeline, adapters):
    """Write a copy of ``opd`` or ``opd+paper`` with a tiny pipeline, tiny adapters and rewards without weights."""

    def write(name: str, stub: bool = True) -> list[str]:
        name, _, ablation = name.partition("+")
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        options = content["model"]["init_args"]
        own = SD3Backbone(**options["backbone"]["init_args"]).guidance_scale
        options["backbone"]["init_args"] = {"path": pipeline, "dtype": "float32", "max_sequence_length": 0}
        options["backbone"]["init_args"] |= {"guidance_scale": own}  # a tiny pipeline has no name that tells
        for holder in (options.get("start"), options.get("strategy")):
            if isinstance(holder, dict) and "adapters" in holder.get("init_args", {}):
                holder["init_args"]["adapters"] = [adapters[path] for path in holder["init_args"]["adapters"]]
        if isinstance(options.get("start"), str):
            options["start"] = next(iter(adapters.values()))
        for source in sources(content["data"]["init_args"]):
            if source["class_path"] == "flowopd.PromptFile":
                source["init_args"]["path"] = "prompts.txt"
        callbacks = content["trainer"]["callbacks"]
        content["trainer"]["callbacks"] = [
            one for one in callbacks if one["class_path"] != "flowopd.ImageGrid" or not stub
        ]
        for callback in callbacks:
            given = callback.get("init_args", {})
            teacher = given.get("teacher", {}).get("init_args", {})
            if "path" in teacher:
                teacher["path"] = adapters[teacher["path"]]
            if stub and "reward" in given:
                given["reward"] = STUB
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        words = ["--config", f"{name}.yaml"]
        if ablation:
            overlay = yaml.safe_load((CONFIGS / "ablations" / f"{ablation}.yaml").read_text())
            if isinstance(overlay["model"]["init_args"].get("start"), str):
                overlay["model"]["init_args"]["start"] = next(iter(adapters.values()))
            Path(f"{ablation}.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
            words += ["--config", f"{ablation}.yaml"]
        return words

    return write


def merged(name: str) -> dict:
    """A recipe, and the ablation after the plus sign laid over it."""
    name, _, ablation = name.partition("+")
    recipe = OmegaConf.load(CONFIGS / f"{name}.yaml")
    parts = [OmegaConf.load(CONFIGS / "ablations" / f"{ablation}.yaml")] if ablation else []
    return OmegaConf.to_container(OmegaConf.merge(recipe, *parts), resolve=False)


def sources(data: dict) -> list[dict]:
    return [*data["prompts"].values(), *data["evaluation_prompts"].values()]


CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.default_root_dir", "run"]


def test_every_recipe_and_every_overlay_that_was_promised_is_there():
    assert sorted(WANTED.split()) == sorted(RECIPES)
    assert sorted(RANKS) == OVERLAYS


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_with_its_own_rewards(name, config, built):
    pytest.importorskip("rapidocr")
    cli = built("test" if name == "evaluate" else "fit", *config(name, stub=False), *CPU)
    assert isinstance(cli.model, FlowPolicy)


@pytest.mark.parametrize(("recipe", "trained"), [("opd", 9), ("opd_folded", 2)])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_builds_on_the_main_recipes(overlay, recipe, trained, config, built):
    cli = built("fit", *config(recipe), "--config", str(CONFIGS / "hardware" / f"{overlay}.yaml"), *CPU)
    assert cli.trainer.num_devices * cli.trainer.num_nodes == RANKS[overlay]
    assert cli.model.backbone.activation_checkpointing == (overlay in ("12gb", "24gb"))
    chunks = 128 // RANKS[overlay] // cli.datamodule.batch_size
    assert cli.trainer.accumulate_grad_batches == trained * chunks


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_sizes_divide_on_every_hardware(name, overlay):
    recipe = merged(name)
    changes = yaml.safe_load((CONFIGS / "hardware" / f"{overlay}.yaml").read_text()).get("data", {"init_args": {}})
    data = {"prompts_per_iteration": 16, "group_size": 1, "batch_size": 16} | recipe["data"]["init_args"]
    data |= changes["init_args"]
    if "updates_per_iteration" not in recipe:
        return  # nothing is trained
    prompts, rest = divmod(data["prompts_per_iteration"], RANKS[overlay])
    chunks, more = divmod(prompts * data["group_size"], data["batch_size"])
    batches = {"cold_start_sft": 4, "opd_folded": 2}.get(name, 9)
    assert rest == more == chunks * batches % recipe["updates_per_iteration"] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_the_sources_say(name):
    content = merged(name)
    model, data = content["model"]["init_args"], content["data"]["init_args"]
    sampler = model["sampler"]["init_args"]
    assert (sampler["num_steps"], sampler["eval_steps"]) == (10, 40)
    assert sampler.get("guidance_scale") == {"cold_start_sft": None, "opd_folded": 1.0}.get(name, 4.5)
    if name.startswith("teacher_"):
        assert model["objective"]["init_args"]["strength"] == (0.01 if name.endswith("pickscore") else 0.04)
        assert (data["prompts_per_iteration"], data["group_size"]) == (48, 24)
    if "optimizer" in model:
        single = name.startswith("teacher_")
        assert model["optimizer"]["init_args"] == {"lr": 3e-4 if single else 1e-4, "weight_decay": 1e-4}
        assert content["trainer"]["gradient_clip_val"] == 1.0


def test_the_levels_of_sft_are_those_of_the_released_code(config, built):
    """An index from logit-normal(0, 1) into SD3's shifted training levels."""
    strategy = built("fit", *config("cold_start_sft"), *CPU).model.strategy
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    shifted = 3 * torch.sigmoid(normal) / (1 + 2 * torch.sigmoid(normal))
    ours = torch.sigmoid(strategy.sigma_mean + strategy.sigma_std * normal)
    torch.testing.assert_close(ours, shifted, rtol=0, atol=1e-4)
    assert ours.tolist() == pytest.approx([0.457, 0.751, 0.916], abs=5e-3)  # a plain logit-normal has .216, .499, .782


SMALL = {
    "data.init_args.evaluation_count": 2,
    "data.init_args.prompts_per_iteration": 4,
    "data.init_args.batch_size": 4,
    "model.init_args.sampler.init_args.num_steps": 3,
    "model.init_args.sampler.init_args.eval_steps": 2,
    "trainer.max_epochs": 2,
    "trainer.check_val_every_n_epoch": 1,
    "updates_per_iteration": 1,
}
SIBLINGS = {"data.init_args.group_size": 2}
UNTRAINED = {"trainer.max_epochs": None, "trainer.check_val_every_n_epoch": None, "updates_per_iteration": None}
CHANGES = {
    "cold_start_merge": UNTRAINED,
    "evaluate": UNTRAINED,
    "grpo_mix": SIBLINGS | {"data.init_args.prompts_per_iteration": 5},
    "opd+paper": SIBLINGS,
    "opd+released": SIBLINGS,
    "cold_start_sft": {"data.init_args.batch_size": 2},
} | {name: SIBLINGS for name in RECIPES if name.startswith("teacher_")}


def options(name: str) -> list[str]:
    values = SMALL | CHANGES.get(name, {})
    if name == "grpo_mix":
        values["data.init_args.batch_size"] = 5
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


ALIKE = {"opd+sft", "opd_no_mar", "teacher_ocr", "teacher_pickscore", "teacher_deqa"}  # run by `pytest -m slow`
RUNS = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in RECIPES]


OURS = ("cold-start", "student", "teacher")
FOLDED = ("opd_folded", "cold_start_sft")  # students that are drawn without guidance


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_runs_two_steps(name, config, flowopd):
    flowopd("test" if name == "evaluate" else "fit", *config(name), *CPU, *options(name))
    with Path("run/results.csv").open(newline="") as file:
        guidance = {row["model"]: row["guidance"] for row in csv.DictReader(file)}
    assert next(iter(guidance)) == "base"
    assert [*guidance][-1] in OURS
    students = {model: guidance.pop(model) for model in OURS if model in guidance}
    assert set(students.values()) == {"1" if name in FOLDED else "4.5"}
    assert set(guidance.values()) == {"4.5"}  # base and teachers, each its own
    if name == "evaluate":
        return
    adapter = read_adapter("run/adapter")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.tensors.values())
    if name != "cold_start_merge":
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
