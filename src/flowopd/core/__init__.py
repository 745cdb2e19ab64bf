"""The maths of flow-matching policies: torch only, float32 in, float32 out."""

from flowopd.core.advantages import GroupAdvantage
from flowopd.core.dynamics import CPS, ODE, DanceSDE, Dynamics, FlowSDE, Transition
from flowopd.core.gaussian import Gaussian
from flowopd.core.guidance import guided
from flowopd.core.levels import Levels, LogitNormal, UniformLevels
from flowopd.core.objectives import (
    Anchored,
    BranchDistance,
    ClippedSurrogate,
    FlowMatching,
    Labels,
    LogRatioSurrogate,
    NegativeAware,
    Objective,
    ReleasedKL,
    ReturnToGo,
    SelfNormalisedDistance,
    StateRewardSurrogate,
    TransitionKL,
    WeightedSum,
)
from flowopd.core.paths import clean_from_velocity, interpolate, noise_from_velocity, velocity_from
from flowopd.core.ramps import Course, Ramp
from flowopd.core.schedules import EmpiricalSchedule, FlowSchedule, LinearSchedule, Schedule, ShiftedSchedule
from flowopd.core.weights import CleanPicture, ExactKL, ODEDistance, Released, Uniform, Weighting

__all__ = [
    "CPS",
    "ODE",
    "Anchored",
    "BranchDistance",
    "CleanPicture",
    "ClippedSurrogate",
    "Course",
    "DanceSDE",
    "Dynamics",
    "EmpiricalSchedule",
    "ExactKL",
    "FlowMatching",
    "FlowSDE",
    "FlowSchedule",
    "Gaussian",
    "GroupAdvantage",
    "Labels",
    "Levels",
    "LinearSchedule",
    "LogRatioSurrogate",
    "LogitNormal",
    "NegativeAware",
    "ODEDistance",
    "Objective",
    "Ramp",
    "Released",
    "ReleasedKL",
    "ReturnToGo",
    "Schedule",
    "SelfNormalisedDistance",
    "ShiftedSchedule",
    "StateRewardSurrogate",
    "Transition",
    "TransitionKL",
    "Uniform",
    "UniformLevels",
    "WeightedSum",
    "Weighting",
    "clean_from_velocity",
    "guided",
    "interpolate",
    "noise_from_velocity",
    "velocity_from",
]
