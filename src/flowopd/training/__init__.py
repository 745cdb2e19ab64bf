"""Lightning modules, the rollout data module and their callbacks."""

from flowopd.training.benchmarks import Benchmarks, Contenders
from flowopd.training.callbacks.drift import DriftMetrics
from flowopd.training.callbacks.ema import EMA
from flowopd.training.callbacks.export import AdapterExport
from flowopd.training.callbacks.fixed_states import FixedStateKL
from flowopd.training.callbacks.guard import Guard
from flowopd.training.callbacks.pictures import ImageGrid, PictureFolder
from flowopd.training.callbacks.progress import Progress
from flowopd.training.callbacks.results import MergeReport, ResultsTable
from flowopd.training.checkpoints import CheckpointAdapter
from flowopd.training.cold_start import SFT, ColdStart
from flowopd.training.grpo_teacher import GRPOTeacher
from flowopd.training.nft_teacher import Inertia, NFTTeacher
from flowopd.training.opd_student import OPDStudent
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule
from flowopd.training.signals import AnchorCallback, RewardCallback, TeacherCallback

__all__ = [
    "EMA",
    "SFT",
    "AdapterExport",
    "AnchorCallback",
    "Benchmarks",
    "CheckpointAdapter",
    "ColdStart",
    "Contenders",
    "DriftMetrics",
    "FixedStateKL",
    "FlowPolicy",
    "GRPOTeacher",
    "Guard",
    "ImageGrid",
    "Inertia",
    "MergeReport",
    "NFTTeacher",
    "OPDStudent",
    "PictureFolder",
    "Progress",
    "ResultsTable",
    "RewardCallback",
    "RolloutDataModule",
    "TeacherCallback",
]
