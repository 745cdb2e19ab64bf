"""Flow-OPD: on-policy distillation of many GRPO teachers into one flow-matching text-to-image student.

Names load on first use, so that ``import flowopd`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "flowopd.training": (
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
        "Progress",
        "ResultsTable",
        "RewardCallback",
        "RolloutDataModule",
        "TeacherCallback",
    ),
    "flowopd.evaluation": ("Benchmark", "Summary"),
    "flowopd.preflight": ("SelfCheck",),
    "flowopd.models": (
        "AdapterSource",
        "Backbone",
        "DiffusersBackbone",
        "Flux2KleinBackbone",
        "FluxBackbone",
        "LoRASpec",
        "Merge",
        "QwenImageBackbone",
        "SD3Backbone",
        "ZImageBackbone",
    ),
    "flowopd.teachers": (
        "AdapterTeacher",
        "BaseTeacher",
        "Beyond",
        "Blend",
        "FullTeacher",
        "LoRATeacher",
        "Piecewise",
        "Router",
        "Teacher",
    ),
    "flowopd.rollouts": ("BetaSteps", "RowNoise", "Sampler", "SpreadSteps"),
    "flowopd.rewards": ("Reward",),
    "flowopd.prompts": ("GapAware", "GenEvalPrompts", "OCRPrompts", "PromptDataset", "PromptFile", "PromptSource"),
    "flowopd.records": ("Conditioning", "Prompt", "Rollout", "StepBatch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME_OF:
        raise AttributeError(f"module 'flowopd' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
