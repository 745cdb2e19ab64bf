"""The laws of the recipes of further families: each parses, builds and runs, with a tiny pipeline in its place."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_families
import torch
import yaml
from torch import Tensor

import flowopd
from flowopd.cli import run as command_line
from flowopd.models import LoRASpec
from flowopd.models.adapters.files import read_adapter, save_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter, take_adapter
from flowopd.preflight.plan import Hardware, plan
from flowopd.records import Prompt

CONFIGS = Path(__file__).parent.parent / "configs"
FAMILIES = {
    "zimage": tiny_families.zimage,
    "qwen_image": tiny_families.qwen,
    "flux1": tiny_families.flux,
    "flux2_klein": tiny_families.klein,
}
SIZES = {"resolution": [16, 24], "max_sequence_length": 160}
RECIPES = [f"{family}/{path.stem}" for family in FAMILIES for path in sorted((CONFIGS / family).glob("*.yaml"))]
WANTED = {"teacher_ocr", "cold_start_merge", "opd", "evaluate"}
STUB = {"class_path": "test_family_configs.Redness"}
OVERLAYS = [f"{family}/hardware/{path.stem}" for family in FAMILIES for path in (CONFIGS / family).glob("hardware/*")]
LIMITS = {"24gb": 24e9, "48gb": 48e9, "1x80gb": 80e9, "8x80gb_fsdp": 80e9}


class Redness:
    """In place of rewards that read weights."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A tiny pipeline of every family."""
    made = {family: str(tmp_path_factory.mktemp("pipelines") / family) for family in FAMILIES}
    for family, folder in made.items():
        FAMILIES[family]().save_pretrained(folder)
    return made


@pytest.fixture
def config(folders, tmp_path, monkeypatch):
    """Write a copy of a recipe with a tiny pipeline, tiny adapters and rewards without weights."""
    monkeypatch.chdir(tmp_path)

    def write(recipe: str) -> list[str]:
        family = recipe.split("/")[0]
        content = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
        backbone = content["model"]["init_args"]["backbone"]
        backbone["init_args"] = {"path": folders[family], "dtype": "float32", **SIZES}
        expert(getattr(flowopd, backbone["class_path"].removeprefix("flowopd.")), backbone["init_args"], family)
        callbacks = content["trainer"]["callbacks"]
        content["trainer"]["callbacks"] = [one for one in callbacks if one["class_path"] != "flowopd.ImageGrid"]
        for callback in callbacks:
            if "reward" in callback.get("init_args", {}):
                callback["init_args"]["reward"] = STUB
        Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return ["--config", "recipe.yaml"]

    return write


def expert(kind, options: dict, family: str) -> None:
    """Random adapters where the recipes look for those of their teachers and students."""
    backbone = kind(**options)
    backbone.load()
    add_adapter(backbone.network, "expert", LoRASpec(rank=2, alpha=4), backbone.targets)
    for name in ("teacher_geneval", "teacher_ocr", "opd"):
        for factor in adapter_parameters(backbone.network, "expert"):
            factor.data.normal_(std=0.05)
        save_adapter(take_adapter(backbone.network, "expert"), Path("runs") / family / name / "adapter")


CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.default_root_dir", "run"]
SMALL = {
    "data.init_args.evaluation_count": 2,
    "model.init_args.sampler.init_args.num_steps": 3,
    "model.init_args.sampler.init_args.eval_steps": 2,
}
TRAINED = {
    "data.init_args.prompts_per_iteration": 4,
    "data.init_args.batch_size": 4,
    "trainer.max_epochs": 2,
    "trainer.check_val_every_n_epoch": 1,
    "updates_per_iteration": 1,
}


def options(recipe: str) -> list[str]:
    trained = not recipe.endswith(("evaluate", "cold_start_merge"))
    values = SMALL | (TRAINED if trained else {}) | ({"data.init_args.group_size": 2} if "/teacher" in recipe else {})
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_recipes_that_were_promised(family):
    assert {path.stem for path in (CONFIGS / family).glob("*.yaml")} >= WANTED


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_two_steps(recipe, config, flowopd):
    flowopd("test" if recipe.endswith("evaluate") else "fit", *config(recipe), *CPU, *options(recipe))
    models = [line.split("|")[1].strip() for line in Path("run/results.md").read_text().splitlines()[2:]]
    ours = "teacher" if "/teacher" in recipe else "cold-start" if recipe.endswith("cold_start_merge") else "student"
    assert (models[0], models[-1]) == ("base", ours)
    if recipe.endswith("evaluate"):
        return
    assert all(bool(tensor.isfinite().all()) for tensor in read_adapter("run/adapter").tensors.values())
    if not recipe.endswith("cold_start_merge"):
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("place", OVERLAYS)
def test_a_plan_says_that_the_main_recipe_fits(place, monkeypatch, flowopd, tmp_path):
    """Of the published size, before anything is read."""
    pytest.importorskip("rapidocr")
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda cli, _: made.append(cli))
    family, _, overlay = place.split("/")
    files = [str(CONFIGS / family / f"{name}.yaml") for name in ("opd", f"hardware/{overlay}")]
    flowopd("fit", "--config", files[0], "--config", files[1], "--trainer.accelerator", "cpu")
    (cli,) = made
    hardware = Hardware(8 if "8x" in overlay else 1, "fsdp" in overlay, autocast=True)
    planned = plan(cli.model, cli.datamodule, cli.trainer.callbacks, hardware)
    assert planned.peak() < LIMITS[overlay]
