"""Lightning modules, the rollout data module and their callbacks."""

from flowopd.training.cold_start import SFT, ColdStart
from flowopd.training.ema import EMA
from flowopd.training.grpo_teacher import GRPOTeacher
from flowopd.training.opd_student import OPDStudent
from flowopd.training.policy import FlowPolicy
from flowopd.training.reports import AdapterExport, ImageGrid, PictureFolder, Progress, ResultsTable
from flowopd.training.rollout_data import RolloutDataModule
from flowopd.training.signals import AnchorCallback, RewardCallback, TeacherCallback

__all__ = [
    "EMA",
    "SFT",
    "AdapterExport",
    "AnchorCallback",
    "ColdStart",
    "FlowPolicy",
    "GRPOTeacher",
    "ImageGrid",
    "OPDStudent",
    "PictureFolder",
    "Progress",
    "ResultsTable",
    "RewardCallback",
    "RolloutDataModule",
    "TeacherCallback",
]
