"""The figures of the paper's tables (arXiv 2605.08063), and the rule of its averages."""

from __future__ import annotations

from collections.abc import Mapping

from flowopd.core.names import perhaps

Figures = Mapping[str, Mapping[str, float]]

TABLE2_DIVISORS = {"DeQA": 5.0, "PickScore": 26.0}

_TABLE2 = {  # GenEval, OCR, DeQA, PickScore, and the average as it is printed
    "SD-3.5-M": (0.63, 0.59, 4.07, 21.64, 0.7166),
    "+ GRPO-GenEval": (0.94, 0.65, 4.01, 21.53, 0.8050),
    "+ GRPO-OCR": (0.64, 0.92, 4.06, 21.69, 0.8016),
    "+ GRPO-DeQA": (0.64, 0.66, 4.23, 23.02, 0.7578),
    "+ GRPO-PickScore": (0.51, 0.69, 4.22, 23.19, 0.7340),
    "GRPO-Mix": (0.73, 0.83, 4.33, 21.84, 0.8165),
    "SFT + GRPO-Mix": (0.85, 0.86, 4.29, 21.79, 0.7166),
    "Merge + GRPO-Mix": (0.84, 0.86, 4.18, 21.87, 0.7166),
    "Flow-OPD (SFT)": (0.91, 0.92, 4.29, 21.83, 0.8819),
    "Flow-OPD (Merge)": (0.92, 0.94, 4.35, 23.08, 0.9044),
}
_TABLE3 = {
    "GRPO-Mix": (0.692, 0.611, 0.422, 0.641),
    "cold start only": (0.710, 0.613, 0.425, 0.646),
    "Flow-OPD (Merge)": (0.719, 0.629, 0.457, 0.684),
}
_TABLE4 = {
    "SD-3.5-M": (1.02, 5.87, 3.339, 0.2982, 3.45),
    "GRPO-DeQA": (1.33, 5.97, 3.456, 0.2846, 3.68),
    "GRPO-Mix": (1.23, 5.93, 3.501, 0.3101, 3.88),
    "Flow-OPD without MAR": (1.26, 5.89, 3.518, 0.2998, 3.82),
    "Flow-OPD (Merge)": (1.36, 6.23, 3.659, 0.3302, 4.05),
}

PRINTED_AVERAGES = {model: figures[-1] for model, figures in _TABLE2.items()}
MISPRINTED = ("SFT + GRPO-Mix", "Merge + GRPO-Mix")
"""Rows of Table 2 that repeat the base's average instead of their own."""


def _named(names: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> Figures:
    return {model: dict(zip(names, figures, strict=False)) for model, figures in rows.items()}


TABLES: Mapping[str, Figures] = {
    "table2": _named(("GenEval", "OCR", "DeQA", "PickScore"), _TABLE2),
    "table3": _named(("color", "shape", "3D-spatial", "numeracy"), _TABLE3),
    "table4": _named(("ImageReward", "Aesthetic", "UnifiedReward", "HPS-v2.1", "QwenVL"), _TABLE4),
}
"""Rows by model. The averages are not among them: the rule makes them, where the paper has one."""


def average(figures: Mapping[str, float], divisors: Mapping[str, float]) -> float:
    """Mean of the figures, each over its divisor; Table 2:  mean(GenEval, OCR, DeQA / 5, PickScore / 26).

    >>> round(average(TABLES["table2"]["Flow-OPD (Merge)"], TABLE2_DIVISORS), 4)
    0.9044
    """
    return sum(value / divisors.get(name, 1.0) for name, value in figures.items()) / len(figures)


def known_table(name: str) -> str:
    """The name of a table of the paper.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in TABLES:
        raise ValueError(f"paper is {name!r}{perhaps(name, TABLES)}; expected one of {', '.join(TABLES)}")
    return name
