"""The laws of what says what it is: a public object of the maths has an example, and prints as it would be made."""

import inspect

import pytest
import torch
from torch import inf, tensor

from flowopd import core, rollouts, teachers
from flowopd.core.shown import shown
from flowopd.core.tensors import expand_like, row_mean, same_shape
from flowopd.rollouts import BetaSteps, RowNoise, Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, Beyond, Blend, LoRATeacher, Piecewise, Router

PUBLIC = {name: getattr(core, name) for name in core.__all__}
EXPLAINED = PUBLIC | {
    thing.__name__: thing
    for thing in (same_shape, expand_like, row_mean, RowNoise, Sampler, Router, Beyond, Blend, Piecewise)
}
THINGS = [
    core.ODE(),
    core.FlowSDE(0.5),
    core.DanceSDE(),
    core.CPS(0.25),
    core.Uniform(),
    core.ODEDistance(),
    core.ExactKL(),
    core.Released(),
    core.CleanPicture(),
    core.LinearSchedule(),
    core.ShiftedSchedule(shift=6.0),
    core.FlowSchedule(2.0, terminal=0.02),
    core.EmpiricalSchedule(tokens=1024),
    core.GroupAdvantage("group", clip=2.0),
    core.TransitionKL(core.Uniform()),
    core.FlowMatching(),
    core.ClippedSurrogate(1e-3),
    core.LogRatioSurrogate(clip_range=inf),
    core.ReturnToGo(pathwise=False),
    core.StateRewardSurrogate(),
    core.ReleasedKL(advantage_clip=1.0),
    core.SelfNormalisedDistance(core.ExactKL()),
    core.BranchDistance(strength=0.5),
    core.NegativeAware(beta=0.5),
    core.LogitNormal(std=1.2),
    core.UniformLevels(low=0.1),
    core.Anchored(core.TransitionKL(), strength=2.5),
    core.Anchored(core.TransitionKL(), core.Ramp(4.0, 1.0, 300), asked=0.5),
    core.Ramp(0.0, 1.0, iterations=3),
    core.WeightedSum([core.TransitionKL(), core.FlowMatching()], [1.0, 0.5]),
    core.Labels(advantage=tensor([0.5])),
    core.Gaussian(tensor([[1.0]]), tensor([0.5])),
    core.ODE().step(tensor([[1.0]]), tensor([[1.0]]), tensor([0.5]), tensor([0.25])),
    SpreadSteps(2),
    BetaSteps(1, 2.0, 5.0, weighted=False),
    RowNoise((4, 8, 8), starts=["a", "a"], rows=["a 0", "a 1"]),
    Sampler(4, dynamics=core.CPS(), window=(0, 2), steps=SpreadSteps(1), guidance_scale=4.5),
    BaseTeacher(2.0),
    LoRATeacher("org/experts", subfolder="ocr", revision="v1", guidance_scale=2.0),
    Beyond(LoRATeacher("org/ocr"), BaseTeacher(), strength=1.5),
    Blend([BaseTeacher(), BaseTeacher(2.0)], [1.0, Piecewise([(0.0, 0.0), (1.0, 1.0)])]),
    Router({"text": BaseTeacher()}, lockstep=True),
]


def words_of(*modules) -> dict[str, object]:
    return {name: thing for module in modules for name, thing in vars(module).items()}


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_public_name_has_an_example(name):
    assert ">>>" in (EXPLAINED[name].__doc__ or "")


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)
def test_an_object_prints_as_it_would_be_made(thing):
    again = eval(repr(thing), words_of(core, rollouts, teachers) | {"tensor": tensor, "inf": inf})
    assert type(again) is type(thing)
    assert repr(again) == repr(thing)


def test_every_class_of_the_maths_prints():
    made = {cls for cls in PUBLIC.values() if inspect.isclass(cls) and not inspect.isabstract(cls)}
    protocols = {core.Course, core.Levels, core.Objective, core.Schedule, core.Weighting}
    assert made - protocols == {type(thing) for thing in THINGS if type(thing).__module__.startswith("flowopd.core")}


def test_what_was_not_told_how_to_print_is_shown_too():
    """An objective of somebody else's, on a model card."""

    class Theirs:
        def __init__(self, strength, weighting, **options):
            self.strength, self.weighting, self.state = strength, weighting, torch.zeros(9)

    assert shown(Theirs(0.5, core.Uniform())) == "Theirs(strength=0.5, weighting=Uniform())"
    assert shown([Theirs(1, None), "folder"]) == "[Theirs(strength=1, weighting=None), 'folder']"
