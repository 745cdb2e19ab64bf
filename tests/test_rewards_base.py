"""The laws of what a reward returns: a number per image, or one sentence that says what came instead."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flowopd import rewards
from flowopd.records import Prompt
from flowopd.rewards import Scores, Weighted, detailed

PROMPTS = [Prompt(text, "any") for text in "abc"]
IMAGES = torch.rand(3, 3, 4, 4)


@dataclass
class Plain:
    """Returns what it is told."""

    answer: Any

    def score(self, images, prompts):
        return self.answer


@dataclass
class Parted(Plain):
    """Returns it with parts, or as them."""

    def detail(self, images, prompts):
        return self.answer


NO_SCORES = {
    "list": ([0.1, 0.2, 0.3], "returned a list; expected"),
    "nothing": (None, "returned a NoneType; expected"),
    "number": (0.5, "returned a float; expected"),
    "array": (np.zeros(3), "returned a ndarray; expected"),
    "scalar": (torch.tensor(0.5), r"returned torch.float32 of shape \(\); expected"),
    "column": (torch.zeros(3, 1), r"returned torch.float32 of shape \(3, 1\); expected"),
    "too few": (torch.zeros(2), r"returned torch.float32 of shape \(2,\); expected"),
    "complex": (torch.zeros(3, dtype=torch.complex64), r"returned torch.complex64 of shape \(3,\); expected"),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_what_is_no_number_per_image_is_refused_wherever_it_stands(name):
    answer, sentence = NO_SCORES[name]
    expected = sentence + r" a tensor of shape \(3,\), a number per image$"
    good = torch.zeros(3)
    for reward, whose in (
        (Plain(answer), "Plain.score "),
        (Parted(Scores(answer)), "Parted.detail "),
        (Parted(Scores(good, {"one": good, "two": answer})), "part 'two' of Parted "),
        (Weighted({"mine": Plain(answer)}, {"mine": 1.0}), "Plain.score "),
    ):
        with pytest.raises(ValueError, match=f"^{whose}{expected}"):
            detailed(reward, IMAGES, PROMPTS)
    with pytest.raises(ValueError, match=r"Parted.detail returned a .*; expected flowopd.rewards.Scores"):
        detailed(Parted(answer), IMAGES, PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_numbers_of_any_kind_are_float32_without_gradient(dtype):
    answer = torch.tensor([0, 1, 1]).to(dtype)
    if dtype == torch.float64:
        answer.requires_grad_()
    scores = detailed(Parted(Scores(answer, {"part": answer})), IMAGES, PROMPTS)
    for column in (scores.value, scores.parts["part"], detailed(Plain(answer), IMAGES, PROMPTS).value):
        assert column.dtype == torch.float32
        assert column.tolist() == [0, 1, 1]
        assert not column.requires_grad


SERVER, HUB = {"url": "http://127.0.0.1:9"}, {}
JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
NO_COUNTS = [0, -1, 2.5, True, "8", float("nan")]
NO_SECONDS = [0, -1.0, float("nan"), float("inf"), 1e9]
NUMBERS = [  # whose, and what it cannot be
    *[(kind, HUB, "batch_size", NO_COUNTS) for kind in ("PickScore", "HPSv2", "ImageReward", "CLIPScore", "Aesthetic")],
    *[(kind, HUB, "batch_size", NO_COUNTS) for kind in ("GenEval", "DeQA")],
    *[(kind, HUB, "dtype", ["half", 16]) for kind in ("PickScore", "CLIPScore", "GenEval", "DeQA")],
    ("CLIPScore", HUB, "resize", ["nearest"]),
    ("GenEval", HUB, "verdict", ["right"]),
    ("OCR", HUB, "workers", NO_COUNTS[1:]),
    ("RemoteReward", SERVER, "batch_size", NO_COUNTS),
    ("RemoteReward", SERVER, "retries", NO_COUNTS[1:]),
    ("RemoteReward", SERVER, "timeout", NO_SECONDS),
    ("RemoteReward", SERVER, "on_failure", ["zero"]),
    *[("Judge", JUDGE, name, NO_COUNTS) for name in ("concurrency", "max_tokens", "resize")],
    ("Judge", JUDGE, "retries", NO_COUNTS[1:]),
    ("Judge", JUDGE, "timeout", NO_SECONDS),
    ("Judge", JUDGE, "scale", NO_SECONDS[:-1]),
    ("Judge", JUDGE, "on_failure", ["zero"]),
]


@pytest.mark.parametrize(("kind", "others", "name", "values"), NUMBERS, ids=[f"{n[0]}-{n[2]}" for n in NUMBERS])
def test_every_number_and_choice_of_a_reward_has_a_range(kind, others, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is {value!r}; expected "):
            getattr(rewards, kind)(**others, **{name: value})


def test_a_failed_row_stays_nan():
    assert detailed(Plain(torch.tensor([0.0, torch.nan, 1.0])), IMAGES, PROMPTS).value.isnan().tolist() == [0, 1, 0]
