"""Scores, tables and pictures of finished models."""

from flowopd.evaluation.benchmark import Benchmark
from flowopd.evaluation.comparison import Summary
from flowopd.evaluation.metrics import GroupedMean
from flowopd.evaluation.pictures import contact_sheet, save_png
from flowopd.evaluation.scoreboard import Scoreboard
from flowopd.evaluation.shots import Shots
from flowopd.evaluation.tables import markdown_table, write_results
from flowopd.rewards.scorer import Column

__all__ = [
    "Benchmark",
    "Column",
    "GroupedMean",
    "Scoreboard",
    "Shots",
    "Summary",
    "contact_sheet",
    "markdown_table",
    "save_png",
    "write_results",
]
