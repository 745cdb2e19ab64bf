"""Prompts: where they come from, and how tasks are mixed."""

from flowopd.prompts.base import PromptSource
from flowopd.prompts.datasets import PromptDataset
from flowopd.prompts.files import PromptFile
from flowopd.prompts.gaps import GapAware
from flowopd.prompts.geneval import GenEvalPrompts
from flowopd.prompts.mixture import Mixture
from flowopd.prompts.ocr import OCRPrompts

__all__ = ["GapAware", "GenEvalPrompts", "Mixture", "OCRPrompts", "PromptDataset", "PromptFile", "PromptSource"]
