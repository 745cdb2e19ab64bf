"""The laws of several ranks: they share the work and change nothing."""

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import tiny
import torch
from ranks import run_ranks

from flowopd.core import ClippedSurrogate, NegativeAware
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import ATTENTION
from flowopd.teachers import LoRATeacher
from flowopd.training import (
    AdapterExport,
    FlowPolicy,
    GRPOTeacher,
    Inertia,
    NFTTeacher,
    OPDStudent,
    RewardCallback,
    TeacherCallback,
)

DDP, FSDP2 = ({"strategy": name, "devices": 2} for name in ("ddp", "fsdp2"))
both_strategies = pytest.mark.parametrize("two_ranks", [DDP, FSDP2], ids=["ddp", "fsdp2"])
TARGETS = [*ATTENTION, "proj_out"]  # the last one is outside of all blocks


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    names = enumerate(("red", "green", "start"))
    return {name: tiny.expert(folder / name, tiny_pipeline, seed, targets=TARGETS) for seed, name in names}


def callbacks(experts, *tasks: str):
    teachers = [TeacherCallback([task], LoRATeacher(experts[task])) for task in tasks or ("red", "green")]
    return [*teachers, RewardCallback("brightness", tiny.Brightness()), AdapterExport()]


def fit(folder, recipe, experts, ranks: int = 1, **options):
    """Two iterations from the same start."""
    torch.manual_seed(0)
    policy = recipe.policy()
    data = tiny.data("red", "green", batch_size=recipe.batch_size, fused=recipe.fused)
    batches = 8 // ranks // recipe.batch_size * policy.batches_per_rollout()
    options |= {"max_epochs": 2, "accumulate_grad_batches": batches // recipe.updates}
    trainer = tiny.trainer(folder, callbacks(experts), **options)
    trainer.fit(policy, data)
    assert trainer.global_step == 2 * recipe.updates
    if trainer.is_global_zero:
        keep(folder / "metrics.json", {name: float(value) for name, value in trainer.callback_metrics.items()})


def keep(path, figures: dict[str, float]):
    path.write_text(json.dumps(figures))


def assert_same_figures(first, second):
    assert json.loads(second.read_text()) == pytest.approx(json.loads(first.read_text()), abs=1e-6)


class Recipe(NamedTuple):
    """A policy, the rows of its batches, the road, and the updates of an iteration."""

    policy: Callable[..., FlowPolicy]
    batch_size: int = 4
    fused: bool = False
    updates: int = 1


GRPO = partial(tiny.policy, GRPOTeacher, objective=ClippedSurrogate(1.0), lr=3.0)
OPD = partial(tiny.policy, OPDStudent, lr=1.0)
NFT = partial(tiny.policy, NFTTeacher, objective=NegativeAware(), inertia=Inertia(0.5, 0.5), lr=0.1)
RECIPES = {  # of eight rows
    "grpo": Recipe(GRPO),
    "whole": Recipe(OPD),
    "fused": Recipe(OPD, fused=True),
    "grpo in two updates": Recipe(GRPO, 2, updates=2),
    "fused in two updates": Recipe(OPD, 2, fused=True, updates=2),
    "nft": Recipe(NFT),
    "nft in two updates": Recipe(NFT, updates=2),
    "sft in two updates": Recipe(tiny.sft, updates=2),
    "sft in four updates": Recipe(tiny.sft, 2, updates=4),
}


@pytest.fixture(scope="module", params=RECIPES)
def alone(request, tiny_pipeline, tmp_path_factory, experts):
    """A recipe, and the folder where one rank trained it."""
    folder, recipe = tmp_path_factory.mktemp("alone"), RECIPES[request.param]
    start = {} if recipe.policy is tiny.sft else {"start": experts["start"]}
    recipe = recipe._replace(policy=partial(recipe.policy, tiny_pipeline, **start))
    fit(folder, recipe, experts)
    return recipe, folder


@both_strategies
def test_two_ranks_train_what_one_trains(tmp_path, experts, alone, two_ranks):
    """Every update takes the same rows."""
    recipe, one = alone
    run_ranks(lambda: fit(tmp_path, recipe, experts, 2, **two_ranks))
    first, second = (read_adapter(str(folder / "adapter")) for folder in (one, tmp_path))
    for key, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[key], value, rtol=0, atol=1e-6)
    begun = {} if recipe.policy.func is tiny.sft else read_adapter(str(experts["start"])).tensors  # B begins with 0
    moved = max((value - begun.get(key, 0)).abs().max() for key, value in first.tensors.items() if "lora_B" in key)
    assert moved > 1e-3
    assert_same_figures(one / "metrics.json", tmp_path / "metrics.json")


@both_strategies
def test_two_ranks_measure_what_one_measures(tiny_pipeline, tmp_path, experts, two_ranks):
    """Three held-out prompts of one task: the second rank draws a row that only pads."""

    def validate(name: str, **options):
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline, start=experts["start"]), tiny.data()
        trainer = tiny.trainer(tmp_path, callbacks(experts, "red"), limit_val_batches=1.0, **options)
        scores = trainer.validate(policy, data, verbose=False)[0]
        if trainer.is_global_zero:
            keep(tmp_path / name, scores)

    validate("one")
    run_ranks(lambda: validate("two", **two_ranks))
    assert_same_figures(tmp_path / "one", tmp_path / "two")


def test_prompts_that_do_not_divide_over_the_ranks_are_refused(tiny_pipeline, tmp_path):
    def refuse():
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline), tiny.data(prompts_per_iteration=3, batch_size=2)
        trainer = tiny.trainer(tmp_path, [RewardCallback("brightness", tiny.Brightness())], **DDP)
        with pytest.raises(ValueError, match=r"3 prompts per iteration .* over 2 ranks; .* multiple of 2"):
            trainer.fit(policy, data)

    run_ranks(refuse)


def test_a_failing_rank_is_reported():
    with pytest.raises(AssertionError, match=r"rank . of 2 failed"):
        run_ranks(lambda: 1 / 0)
