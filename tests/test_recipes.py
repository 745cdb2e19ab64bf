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
FILES = sorted([*(CONFIGS / "tiles").glob("*.yaml"), *(CONFIGS / "sd35").glob("*.yaml")])
READ = {f"{path.parent.name}/{path.stem}": OmegaConf.load(path) for path in FILES if path.stem != "pretrain"}
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


@every_trained_recipe
def test_every_update_has_each_task_by_its_share(name):
    recipe, data = READ[name], READ[name].data.init_args
    ratio = dict(data.get("ratio") or dict.fromkeys(data.prompts, 1))
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
    steps = 4 if name == "sd35/cold_start_sft" else 8 if name == "tiles/cold_start_sft" else last - first
    for size in (data.batch_size, data.batch_size // 2, data.batch_size // 4):
        chunks, rest = divmod(data.prompts_per_iteration * data.get("group_size", 1), size)
        assert rest == chunks * steps % recipe.updates_per_iteration == 0
