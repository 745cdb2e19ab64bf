"""A class that does not fit where it is given is told the method and signature that were expected, before any work."""

import sys
from pathlib import Path

import grammar
import pytest
import yaml

from flowopd.cli import run as command_line
from flowopd.cli.main import main
from flowopd.cli.seams import inherited_misfit, misfit
from flowopd.core.dynamics import Dynamics
from flowopd.core.levels import Levels
from flowopd.core.objectives import Objective
from flowopd.core.ramps import Course
from flowopd.core.schedules import Schedule
from flowopd.core.weights import Weighting
from flowopd.models import Backbone
from flowopd.prompts import PromptSource
from flowopd.rewards import Reward
from flowopd.rewards.model import ModelReward
from flowopd.rollouts.steps import Steps
from flowopd.teachers import Teacher

SEAMS = {
    Backbone: ("encode", "encode(self, texts: Sequence[str]) -> Conditioning"),
    ModelReward: ("forward", "forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores"),
    Reward: ("score", "score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor"),
    Teacher: ("velocity", "velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor"),
    Objective: ("loss", "loss(self, student: Transition, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]"),
    Dynamics: ("coefficients", "coefficients(self, sigma: Tensor, sigma_next: Tensor) -> Coefficients"),
    Schedule: ("sigmas", "sigmas(self, num_steps: int) -> Tensor"),
    PromptSource: ("draw", "draw(self, count: int, seed: int) -> list[Prompt]"),
    Steps: ("probabilities", "probabilities(self, sigmas: Tensor) -> Tensor"),
    Weighting: ("weight", "weight(self, step: Transition) -> Tensor"),
    Levels: ("levels", "levels(self, normal: Tensor) -> Tensor"),
    Course: ("at", "at(self, iteration: int) -> float"),
}

STRANGERS = """
from collections.abc import Sequence
from torch import Tensor
from flowopd import Backbone, LoRATeacher, Prompt, SD3Backbone

class Unannotated:
    def score(self, images, prompts):
        return images.mean((1, 2, 3))

class Swapped:
    def score(self, prompts: Sequence[Prompt], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

class Half(Backbone):
    def load(self, device="cpu"): ...

class Other(SD3Backbone):
    def velocity(self, x, sigma, cond, guidance_scale=1.0):
        return x

class Further(SD3Backbone):
    def velocity(self, *args, more=None, **words):
        return super().velocity(*args, **words)

class Stranger(LoRATeacher):
    def velocity(self, x, t, cond):
        return x
"""

REWARD = ("trainer", "callbacks", 0, "init_args", "reward")
TEACHER = ("trainer", "callbacks", 5, "init_args", "teacher")
BACKBONE = ("model", "init_args", "backbone", "class_path")
SAMPLER = ("model", "init_args", "sampler")
GIVEN = {
    "a reward without annotations": (
        REWARD,
        {"class_path": "strangers.Unannotated"},
        "trainer.callbacks.reward: strangers.Unannotated is not a Reward: it has score(self, images, prompts); "
        "expected score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor",
    ),
    "a reward of swapped arguments": (REWARD, {"class_path": "strangers.Swapped"}, "it has score(self, prompts: Seq"),
    "a teacher that is none": (
        TEACHER,
        {"class_path": "strangers.Unannotated"},
        "trainer.callbacks.teacher: strangers.Unannotated is not a Teacher: it has no attach; "
        "expected attach(self, backbone: Backbone) -> None",
    ),
    "a sampler that is none": (
        SAMPLER,
        {"class_path": "strangers.Unannotated"},
        "strangers.Unannotated is not a Sampler: it is no subclass of flowopd.rollouts.sampler.Sampler",
    ),
    "half a backbone": (
        BACKBONE,
        "strangers.Half",
        "strangers.Half is not a Backbone: it has no network; expected a property network",
    ),
    "a backbone called otherwise": (
        BACKBONE,
        "strangers.Other",
        "model.backbone: strangers.Other is not a SD3Backbone: it has velocity(self, x, sigma, cond, "
        "guidance_scale=1.0); expected velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | ",
    ),
    "a teacher called otherwise": (
        (*TEACHER, "class_path"),
        "strangers.Stranger",
        "trainer.callbacks.teacher: strangers.Stranger is not a Teacher: it has velocity(self, x, t, cond); expected",
    ),
}


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """What the command line says of a recipe in which something stands in the place of something else."""

    def say(where, value):
        Path("recipe.yaml").write_text(yaml.safe_dump(grammar.changed(grammar.recipe(), where, value)))
        monkeypatch.setattr(sys, "argv", ["flowopd", "fit", "--config", "recipe.yaml"])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err.removeprefix("flowopd: error: ").rstrip("\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command_line.FlowCLI, "instantiate_classes", lambda *_: pytest.fail("something was built"))
    Path("strangers.py").write_text(STRANGERS)
    yield say
    sys.modules.pop("strangers", None)


@pytest.mark.parametrize("given", GIVEN)
def test_a_class_that_does_not_fit_is_told_what_was_expected_before_any_work(given, answer):
    where, value, expected = GIVEN[given]
    sentence = answer(where, value)
    assert expected in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.__name__)
def test_every_seam_says_what_it_expects(seam):
    name, expected = SEAMS[seam]
    first = misfit(type("Nothing", (), {}), seam)
    assert first.startswith("it has no ")
    others = {method: lambda self, *args, **words: None for method in dir(seam) if not method.startswith("_")}
    lacking = type("Lacking", (), {method: body for method, body in others.items() if method != name})
    otherwise = type("Otherwise", (), others | {name: lambda self: None})
    assert misfit(lacking, seam).startswith(f"it has no {name}; expected {expected}")
    assert misfit(otherwise, seam).startswith(f"it has {name}(self); expected {expected}")
    assert misfit(type("Fits", (), others), seam) is None


def test_what_takes_more_fits():
    scope: dict = {}
    exec(STRANGERS, scope)
    assert inherited_misfit(scope["Further"]) is None
    assert misfit(scope["Unannotated"], Reward) is None
