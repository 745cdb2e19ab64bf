"""Prompts: where they come from, and how tasks are mixed."""

from flowopd.prompts.base import PromptSource
from flowopd.prompts.files import PromptFile
from flowopd.prompts.mixture import Mixture

__all__ = ["Mixture", "PromptFile", "PromptSource"]
