"""What peft's config says of an adapter, read strictly: a plain LoRA, or a sentence about what else it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

T = TypeVar("T")

SHAPE = (  # all that can be said of a plain LoRA
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
IRRELEVANT = {  # to what an adapter changes once it is trained
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # beside init_lora_weights, which is looked at
    *("init_lora_weights", "qalora_group_size", "megatron_core"),
    "fan_in_fan_out",  # peft takes it back for the linear layers of torch
}
MORE = {
    "use_dora": "is a DoRA, whose trained magnitudes are not of the form B·A",
    "bias": "has trained biases (bias)",
    "lora_bias": "has trained biases of its B factors (lora_bias)",
    "modules_to_save": "has whole trained modules (modules_to_save)",
}
BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
CONVERTED = ("pissa", "olora", "corda", "lora_ga")
AGAIN = "train it again without, or teach with its merged model (peft's merge_and_unload) as a FullTeacher"


def plain_config(content: Mapping[str, Any]) -> LoraConfig:
    """The config of a plain LoRA, with nothing in it but ranks, strengths and targets.

    Args:
        content: of ``adapter_config.json``, or of the metadata of diffusers.

    Raises:
        ValueError: if it is more than a plain LoRA, saying what, and how to make one of it.
    """
    if (kind := content.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"is of peft's type {kind}, not LORA; convert it with peft's save_as_lora, if peft can")
    _refuse_moved_base(content.get("init_lora_weights", True))
    for key in sorted(content.keys() - set(SHAPE) - IRRELEVANT):
        if content[key] and content[key] != "none":
            raise ValueError(f"{MORE.get(key, f'uses {key}, which is more than a plain LoRA')}; {AGAIN}")
    if not isinstance(content.get("target_modules"), str | list):
        raise ValueError(f"has target_modules {content.get('target_modules')!r} in its config; expected names")
    config = _ask(lambda: LoraConfig(**{key: content[key] for key in SHAPE if key in content}))
    ranks = {"r": config.r, **_by_module("a rank", config.rank_pattern)}
    alphas = {"lora_alpha": config.lora_alpha, **_by_module("an alpha", config.alpha_pattern)}
    for name, value in (ranks | alphas).items():
        if not _number(value) or (name in ranks and (value < 1 or value % 1)):
            raise ValueError(f"has {name} {json.dumps(value)} in its config; expected a number, and ranks of 1 or more")
    return config


def _refuse_moved_base(init: object) -> None:
    name = init.lower() if isinstance(init, str) else init
    if name in BASE_KEPT:
        return
    if isinstance(name, str) and name.startswith(CONVERTED):
        raise ValueError(
            f"was initialised by {init}, which moves the base, so that its tensors mean a change of another base; make "
            "a plain LoRA of it by peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    raise ValueError(f"was initialised by {init}, which may change the base; {AGAIN}")


def _ask(question: Callable[[], T]) -> T:
    """Ask peft, which checks little of a config and stumbles over the rest in many ways."""
    try:
        return question()
    except Exception as error:
        raise ValueError(f"has a config that peft does not accept ({' '.join(str(error).split())})") from error


def _by_module(what: str, pattern: object) -> dict[str, Any]:
    if not isinstance(pattern or {}, dict):
        raise ValueError(f"has {pattern!r} in its config for {what} by module; expected an object")
    return {f"{what} of {key}": value for key, value in (pattern or {}).items()}  # type: ignore[attr-defined]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def check_module(config: LoraConfig, module: str, rank: int) -> None:
    """Raise unless a config speaks of a module, at the rank of its tensors.

    Raises:
        ValueError: if it does not.
    """
    if config.target_modules != "all-linear" and not _ask(lambda: check_target_module_exists(config, module)):
        raise ValueError(f"has tensors of {module}, which its config does not target")
    said = _matching(config.rank_pattern, module, config.r)
    if said != rank:
        raise ValueError(
            f"has rank {said} in its config, but rank {rank} in the tensors of {module}; correct the config"
        )


def scale(config: LoraConfig, module: str, rank: int) -> float:
    """What B·A of a module is multiplied by, as peft does: alpha / r, or alpha / √r with ``use_rslora``."""
    alpha = _matching(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _matching(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    known = pattern or {}
    return known.get(_ask(lambda: get_pattern_key(list(known), module)), default)
