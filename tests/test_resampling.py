"""The laws of intervals: they cover what they claim, and a difference on the same noise is surer than two figures."""

import math

import pytest
import torch

from flowopd.evaluation.paper import MISPRINTED, PRINTED_AVERAGES, TABLE2_DIVISORS, TABLES, average
from flowopd.evaluation.resampling import best_of_n, estimate, macro, mean, mean_of, resamples, spread, worst_tenth

NAN = math.nan


def scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LAWS = {  # draws of scores in [0, 1], and their mean
    "even": (lambda u: u, 0.5),
    "right or wrong": (lambda u: (u < 0.3).double(), 0.3),
    "skewed": (lambda u: u**4, 0.2),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("prompts", [64, 256])
def test_intervals_have_the_coverage_they_claim(law, prompts):
    """95 %, in 2 000 experiments of so many prompts."""
    draw, truth = LAWS[law]
    seen = draw(torch.rand(prompts, 2000, dtype=torch.float64))
    means = resamples(prompts, "coverage") @ seen / prompts
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    assert 0.92 < ((low <= truth) & (truth <= high)).double().mean() < 0.97


def test_a_paired_interval_is_narrower_than_an_unpaired_one_where_prompts_are_hard_for_both():
    hardness = torch.rand(128, 1)
    one = hardness + 0.1 * torch.rand(128, 2)
    other = hardness + 0.1 * torch.rand(128, 2) + 0.05
    paired = estimate(other, mean, "b") - estimate(one, mean, "b")
    unpaired = estimate(other, mean, "b") - estimate(one, mean, "another benchmark")
    widths = [interval.high - interval.low for interval in (paired.interval(), unpaired.interval())]
    assert widths[0] < 0.3 * widths[1]
    assert paired.value == pytest.approx(float((other - one).mean()), abs=1e-7)
    assert paired.interval().low > 0 > unpaired.interval().low


def test_figures_are_those_of_a_loop():
    seen = scores([0.0, 1.0], [0.5, NAN], [NAN, NAN], [1.0, 1.0])
    figures = {f.__name__: estimate(seen, f, "b").value for f in (mean, best_of_n, spread)}
    assert figures == pytest.approx({"mean": 3.5 / 5, "best_of_n": 2.5 / 3, "spread": 0.5 / 3})
    assert estimate(seen, macro([[0, 1], [2, 3]]), "b").value == pytest.approx((0.5 + 1) / 2)


def test_the_worst_tenth_is_the_mean_of_the_lowest_scores():
    seen = torch.arange(40, dtype=torch.float64)[torch.randperm(40)][:, None]
    assert estimate(seen, worst_tenth, "b").value == (0 + 1 + 2 + 3) / 4
    ten = resamples(40, "b")[:1]
    each = seen[:, 0].repeat_interleave(ten[0].long()).sort().values
    assert float(worst_tenth(seen, ten)) == pytest.approx(float(each[:4].mean()))


def test_what_has_no_score_has_no_figure():
    nothing = estimate(scores([NAN], [NAN]), mean, "b")
    assert all(math.isnan(number) for number in nothing.interval())
    assert mean_of([nothing, estimate(scores([1.0], [0.0]), mean, "b")]).value == 0.5


@pytest.mark.parametrize("model", TABLES["table2"])
def test_the_rule_gives_every_average_of_the_papers_table_but_two_misprints(model):
    found = average(TABLES["table2"][model], TABLE2_DIVISORS)
    assert (abs(found - PRINTED_AVERAGES[model]) <= 1e-4) == (model not in MISPRINTED)
    if model in MISPRINTED:
        assert round(found, 4) == {"SFT + GRPO-Mix": 0.8515, "Merge + GRPO-Mix": 0.8443}[model]
