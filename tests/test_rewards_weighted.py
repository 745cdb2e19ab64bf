"""The weighted sum: linear, NaN where a term it counts is, and written in YAML."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import pytest
import torch
from torch import Tensor

from flowopd import rewards
from flowopd.records import Prompt
from flowopd.rewards import Reward, Scores, Weighted


class Channel:
    """Mean of one channel.

    Args:
        index: of the channel.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images[:, self.index].mean((1, 2))


class Halves(Channel):
    """The same, with a part for each half of the picture."""

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        left, right = (half.mean((1, 2)) for half in images[:, self.index].chunk(2, -1))
        return Scores((left + right) / 2, {"left": left, "right": right})


class Lost(Channel):
    """NaN for the first image."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return super().score(images, prompts).index_fill(0, torch.tensor([0]), math.nan)


def images():
    return torch.rand(4, 3, 6, 6)


PROMPTS = [Prompt("any", "any")] * 4


def test_the_score_is_the_weighted_sum():
    x = images()
    mixed = Weighted({"red": Channel(0), "green": Halves(1)}, {"red": 0.8, "green": -0.2})
    expected = 0.8 * x[:, 0].mean((1, 2)) - 0.2 * x[:, 1].mean((1, 2))
    torch.testing.assert_close(mixed.score(x, PROMPTS), expected)


def test_the_parts_are_the_terms_and_their_parts():
    x = images()
    scores = Weighted({"red": Channel(0), "green": Halves(1)}, {"red": 1, "green": 1}).detail(x, PROMPTS)
    assert list(scores.parts) == ["red", "green", "green/left", "green/right"]
    torch.testing.assert_close(scores.parts["green"], x[:, 1].mean((1, 2)))
    torch.testing.assert_close(scores.parts["green/left"], x[:, 1, :, :3].mean((1, 2)))


def test_a_sum_may_be_a_term():
    x = images()
    inner = Weighted({"green": Halves(1)}, {"green": 0.5})
    scores = Weighted({"red": Channel(0), "more": inner}, {"red": 1, "more": 2}).detail(x, PROMPTS)
    torch.testing.assert_close(scores.value, x[:, 0].mean((1, 2)) + x[:, 1].mean((1, 2)))
    assert list(scores.parts) == ["red", "more", "more/green", "more/green/left", "more/green/right"]


def test_a_term_that_failed_fails_its_rows_unless_its_weight_is_zero():
    x = images()
    terms = {"red": Channel(0), "lost": Lost(1)}
    counted = Weighted(terms, {"red": 1, "lost": 0.1}).score(x, PROMPTS)
    assert counted.isnan().tolist() == [True, False, False, False]
    watched = Weighted(terms, {"red": 1, "lost": 0}).detail(x, PROMPTS)
    torch.testing.assert_close(watched.value, x[:, 0].mean((1, 2)))
    assert watched.parts["lost"].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("weights", [{}, {"red": 1.0, "green": 1.0}, {"blue": 1.0}])
def test_names_that_do_not_match_are_refused(weights):
    with pytest.raises(ValueError, match="expected a weight for every term, got terms"):
        Weighted({"red": Channel()}, weights)


def test_nothing_to_sum_and_weights_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="expected a weight for every term"):
        Weighted({}, {})
    with pytest.raises(ValueError, match="weight of red is nan; expected a finite number"):
        Weighted({"red": Channel()}, {"red": math.nan})


@pytest.mark.parametrize("name", sorted(rewards._HOMES.keys() - {"Judging", "Scorer"}))  # these carry rewards
def test_every_reward_of_this_folder_has_parts_and_a_page(name):
    kind = getattr(rewards, name)
    assert callable(kind.score)
    assert callable(kind.detail)
    folder = Path(rewards.__file__).parent
    page = re.search(rf"\[`{name}`\]\((pages/\w+\.md)\)", (folder / "README.md").read_text())[1]
    text = (folder / page).read_text().lower()
    for told in ("definition", "scale", "licence|mit|apache", "memory|gb", "weights|server", "hack"):
        assert re.search(told, text), f"{page} says nothing of {told}"


YAML = f"""
reward:
  class_path: flowopd.rewards.Weighted
  init_args:
    terms:
      red: {{class_path: {__name__}.Channel, init_args: {{index: 2}}}}
      deqa: {{class_path: flowopd.rewards.DeQA, init_args: {{path: nowhere, dtype: bfloat16}}}}
      judge:
        class_path: flowopd.rewards.Judge
        init_args:
          base_url: http://127.0.0.1:8001/v1
          model: judge-7b
          pattern: {{overall: 'Overall: (\\d)'}}
    weights: {{red: 0.5, deqa: 0.25, judge: 1}}
"""


def parser():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--reward", type=Reward)
    return made


def test_nested_rewards_are_written_in_yaml():
    made = parser()
    reward = made.instantiate(made.parse_string(YAML)).reward
    assert isinstance(reward, Weighted)
    assert reward.weights == {"red": 0.5, "deqa": 0.25, "judge": 1.0}
    assert reward.terms["red"].index == 2
    assert reward.terms["deqa"].torch_dtype == torch.bfloat16
    assert list(reward.terms["judge"].patterns) == ["overall"]


@pytest.mark.parametrize(
    ("found", "wrong"),
    [("DeQA", "Prompt"), ("index: 2", "idnex: 2"), ("red: 0.5", "red: much"), ("dtype: bfloat16", "dtype: float8")],
)
def test_a_mistake_in_a_nested_reward_is_refused_before_anything_is_loaded(found, wrong):
    with pytest.raises(jsonargparse.ArgumentError):
        parser().parse_string(YAML.replace(found, wrong))
