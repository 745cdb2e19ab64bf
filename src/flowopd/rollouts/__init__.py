"""Sampling trajectories, and which of their steps are trained."""

from flowopd.rollouts.draws import Draw
from flowopd.rollouts.noise import RowNoise
from flowopd.rollouts.sampler import Sampler, VelocityField
from flowopd.rollouts.steps import BetaSteps, SpreadSteps, Steps

__all__ = ["BetaSteps", "Draw", "RowNoise", "Sampler", "SpreadSteps", "Steps", "VelocityField"]
