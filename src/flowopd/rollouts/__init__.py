"""Sampling trajectories, and cutting them into steps."""

from flowopd.rollouts.noise import RowNoise
from flowopd.rollouts.sampler import Sampler, VelocityField

__all__ = ["RowNoise", "Sampler", "VelocityField"]
