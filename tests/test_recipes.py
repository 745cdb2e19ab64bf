"""The laws of configs: updates are said, schedules end with the run, and an update has each task by its share."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf

from flowopd.cli import run as command_line
from flowopd.cli.main import main
from flowopd.prompts import Mixture

CONFIGS = Path(__file__).parent.parent / "configs"
WORLDS = ("tiles", "sd35", "zimage", "qwen_image", "flux1", "flux2_klein")
FILES = sorted(path for world in WORLDS for path in (CONFIGS / world).glob("*.yaml"))
ABLATIONS = sorted(CONFIGS.glob("*/ablations/*.yaml"))
OTHER = ("pretrain", "ablations", "study", "benchmark")  # of another module; studies; many models
READ = {f"{path.parent.name}/{path.stem}": OmegaConf.load(path) for path in FILES if path.stem not in OTHER}
for path in ABLATIONS:
    world = path.parent.parent.name
    READ[f"{world}/opd+{path.stem}"] = OmegaConf.merge(READ[f"{world}/opd"], OmegaConf.load(path))
TRAINED = [name for name, recipe in READ.items() if recipe.trainer.get("max_epochs")]
every_trained_recipe = pytest.mark.parametrize("name", TRAINED)


@every_trained_recipe
def test_a_recipe_says_its_updates_and_not_how_batches_are_accumulated(name):
    recipe = READ[name]
    assert recipe.updates_per_iteration >= 1
    assert "accumulate_grad_batches" not in recipe.trainer
    assert "batch_size" in recipe.data.init_args


@every_trained_recipe
def test_a_schedule_ends_with_the_run(name):
    """It is stepped after every optimiser step, of which the run has updates x iterations."""
    options = READ[name].model.init_args.get("scheduler", {}).get("init_args", {})
    if "T_max" in options:
        assert options.T_max == READ[name].updates_per_iteration * READ[name].trainer.max_epochs


FIXED = [name for name in TRAINED if "class_path" not in (READ[name].data.init_args.get("ratio") or {})]


@pytest.mark.parametrize("name", FIXED)
def test_every_update_has_each_task_by_its_share(name):
    recipe, data = READ[name], READ[name].data.init_args
    given = data.get("ratio") or {}
    ratio = dict.fromkeys(data.prompts, 1) if "class_path" in given or not given else dict(given)  # gaps begin alike
    mixture = Mixture({task: tiny.Words(task) for task in ratio}, ratio, data.get("alternate", False))
    prompts = mixture.draw(data.prompts_per_iteration, 0, 0)
    tasks = [prompts[index].task for index in mixture.dealt(len(prompts), 0)]
    whole, size = Counter(tasks), len(tasks) // recipe.updates_per_iteration
    for first in range(0, len(tasks), size):
        part = Counter(tasks[first : first + size])
        assert {task: n * recipe.updates_per_iteration for task, n in part.items()} == whole


BUILT = {"tiles/opd": 12, "tiles/teacher_crispness": 128, "tiles/cold_start_sft": 32}


@pytest.mark.parametrize("name", BUILT)
def test_halving_the_batches_leaves_the_updates(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, size = [], BUILT[name]
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda cli, _: made.append(cli))
    words = ["--config", str(CONFIGS / f"{name}.yaml"), f"--data.init_args.batch_size={size}"]
    monkeypatch.setattr(sys, "argv", ["flowopd", "fit", *words, "--trainer.accelerator=cpu"])
    main()
    (cli,) = made
    assert READ[name].data.init_args.batch_size == 2 * size
    batches = cli.datamodule.prompts_per_iteration * cli.datamodule.group_size // size * cli.model.batches_per_rollout()
    assert batches / cli.trainer.accumulate_grad_batches == READ[name].updates_per_iteration


@every_trained_recipe
def test_batches_of_any_size_make_the_updates_that_the_recipe_says(name):
    """``updates_per_iteration`` is exact wherever it divides the batches of an iteration."""
    recipe, data = READ[name], READ[name].data.init_args
    sampler = recipe.model.init_args.sampler.init_args
    first, last = sampler.get("trained") or sampler.get("window") or (0, sampler.num_steps - 1)
    drawn = sampler.steps.init_args.count if sampler.get("steps") else last - first
    steps = {"sd35/cold_start_sft": 4, "tiles/cold_start_sft": 8}.get(name, drawn)
    for size in (data.batch_size, data.batch_size // 2, data.batch_size // 4):
        chunks, rest = divmod(data.prompts_per_iteration * data.get("group_size", 1), size)
        assert rest == chunks * steps % recipe.updates_per_iteration == 0


# ------------------------------------------------------------------------------------------------------- one difference


def leaves(node, place=""):
    """Every value of a recipe by its place; callbacks go by class and number."""
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in leaves(child, f"{place}.{name}").items()}
    if isinstance(node, list) and node and isinstance(node[0], dict):
        named = {
            f"{one['class_path']} {one.get('init_args', {}).get('name', '')}{i}": one for i, one in enumerate(node)
        }
        return leaves(named, place)
    return {place.removeprefix("."): node}


def differences(one, other):
    """Places whose values differ."""
    first, second = (leaves(OmegaConf.to_container(READ[name], resolve=False)) for name in (one, other))
    return {place for place in first.keys() | second.keys() if first.get(place) != second.get(place)}


@pytest.mark.parametrize("world", ["tiles", "sd35"])
def test_opd_without_mar_differs_from_opd_by_the_anchor_alone(world):
    opd, plain = (OmegaConf.to_container(READ[f"{world}/{name}"], resolve=False) for name in ("opd", "opd_no_mar"))
    anchored = opd["model"]["init_args"]["objective"]
    assert anchored["class_path"] == "flowopd.core.Anchored"
    opd["model"]["init_args"]["objective"] = anchored["init_args"]["objective"]
    callbacks = opd["trainer"]["callbacks"]
    anchors = [one for one in callbacks if one["class_path"] == "flowopd.AnchorCallback"]
    assert len(anchors) == 1
    callbacks.remove(anchors[0])
    opd["trainer"]["default_root_dir"] = plain["trainer"]["default_root_dir"]
    assert opd == plain


ONE_DIFFERENCE = {
    ("tiles/opd", "tiles/opd_full"): {
        "model.init_args.start.init_args.weights",
        "data.init_args.ratio",
        "model.init_args.objective.init_args.strength",
        "trainer.max_epochs",
        "trainer.check_val_every_n_epoch",
        "trainer.callbacks.flowopd.ImageGrid 9.init_args.every",
    },
    ("sd35/opd", "sd35/opd_folded"): {
        "model.init_args.sampler.init_args.guidance_scale",
        "model.init_args.sampler.init_args.steps",
    },
    ("sd35/opd", "sd35/opd+sft"): {
        "model.init_args.start",
        "model.init_args.start.class_path",
        "model.init_args.start.init_args.adapters",
    },
    ("sd35/opd", "sd35/opd+branches"): {
        "model.init_args.objective.init_args.objective.class_path",
        "model.init_args.objective.init_args.objective.init_args.weighting",
    },
    ("sd35/opd", "sd35/opd+paper"): {
        "updates_per_iteration",
        "model.init_args.objective.init_args.objective.class_path",
        "data.init_args.prompts_per_iteration",
        "data.init_args.group_size",
        "data.init_args.fused",
    },
    ("sd35/teacher_deqa", "sd35/teacher_pickscore"): {
        "model.init_args.objective.init_args.strength",
        "data.init_args.prompts",
        "data.init_args.evaluation_prompts",
        "trainer.callbacks",
    },
}


@pytest.mark.parametrize("pair", ONE_DIFFERENCE, ids=" and ".join)
def test_recipes_that_claim_to_differ_in_something_differ_in_that_alone(pair):
    claimed = ONE_DIFFERENCE[pair]
    for place in differences(*pair) - {"trainer.default_root_dir"}:
        assert any(place == one or place.startswith(f"{one}.") for one in claimed), f"{place} differs too"


@pytest.mark.parametrize("world", WORLDS)
def test_every_recipe_of_a_world_has_one_backbone_and_what_is_compared_one_grid(world):
    recipes = {name: recipe.model.init_args for name, recipe in READ.items() if name.startswith(f"{world}/")}
    assert len({str(options.backbone) for options in recipes.values()}) == 1
    grids = [options.sampler.init_args for options in recipes.values()]
    assert len({grid.get("eval_steps", grid.num_steps) for grid in grids}) == 1
    other = ("rewarded", "sd35/opd_folded")
    distilled = [
        name
        for name in recipes
        if name.startswith(f"{world}/opd") and "+" not in name and not any(word in name for word in other)
    ]
    students = [recipes[name].sampler for name in distilled]
    assert len({str(sampler) for sampler in students}) == 1


def test_the_readme_of_configs_names_every_config():
    told = (CONFIGS / "README.md").read_text()
    for path in CONFIGS.rglob("*.yaml"):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        assert f"`{name}`" in told or f"`{path.stem}`" in told or f"`_{path.stem.split('_')[-1]}`" in told, name
