"""Sampling trajectories, and cutting them into steps."""

from flowopd.rollouts.draws import Draw
from flowopd.rollouts.noise import RowNoise
from flowopd.rollouts.sampler import Sampler, VelocityField

__all__ = ["Draw", "RowNoise", "Sampler", "VelocityField"]
