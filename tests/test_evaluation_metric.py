"""The laws of means by group: exact over ranks, without failures, without what only pads."""

import json

import pytest
import tiny
import torch
from ranks import run_ranks
from torch import distributed

from flowopd.evaluation import Column, GroupedMean, Scoreboard
from flowopd.training import RewardCallback

GROUPS = ["single", "two", "counting", "unused"]
NAN = torch.nan


def samples(count: int = 101):
    """Scores, groups and weights; some failed, the last three are padding."""
    noise = torch.Generator().manual_seed(3)
    values = torch.rand(count, generator=noise)
    values[7] = NAN
    group = torch.randint(3, (count,), generator=noise)
    weight = (torch.arange(count) < count - 3).float()
    return values, group, weight


@pytest.mark.parametrize("macro", [False, True])
def test_means_are_those_of_a_loop(macro):
    values, group, weight = samples()
    metric = GroupedMean(GROUPS, macro)
    metric.update(values, group, weight)
    rows = [i for i in range(101) if weight[i] and not values[i].isnan()]
    means = {
        name: sum(float(values[i]) for i in rows if group[i] == number) / sum(1 for i in rows if group[i] == number)
        for number, name in enumerate(GROUPS[:3])
    }
    overall = sum(means.values()) / 3 if macro else sum(float(values[i]) for i in rows) / len(rows)
    result = {name: float(value) for name, value in metric.compute().items()}
    failed = {f"{GROUPS[group[7]]}/failed": 1}
    assert result == pytest.approx(means | {"overall": overall} | failed, rel=1e-14)


def test_batches_may_be_cut_anywhere():
    values, group, weight = samples()
    whole, cut = GroupedMean(GROUPS), GroupedMean(GROUPS)
    whole.update(values, group, weight)
    for rows in torch.arange(101).split([1, 50, 0, 13, 37]):
        cut.update(values[rows], group[rows], weight[rows])
    assert whole.compute() == cut.compute()


def test_a_group_that_failed_altogether_is_left_out_and_told():
    metric = GroupedMean(["a", "b"], macro=True)
    metric.update(torch.tensor([0.5, NAN, torch.inf]), ["a", "b", "b"])
    assert metric.compute() == {"a": 0.5, "overall": 0.5, "b/failed": 2}
    metric.reset()
    metric.update(torch.tensor([NAN]), ["a"])
    assert metric.compute() == {"a/failed": 1}


def test_a_failure_that_only_pads_is_none():
    metric = GroupedMean(["a"])
    metric.update(torch.tensor([1.0, NAN, 0.0]), ["a", "a", "a"], torch.tensor([1, 0, 0]))
    assert metric.compute() == {"a": 1.0, "overall": 1.0}


def test_unknown_and_reserved_groups_are_refused():
    with pytest.raises(ValueError, match="there is no group 'c'; expected one of a, b"):
        GroupedMean(["a", "b"]).update(torch.ones(1), ["c"])
    with pytest.raises(ValueError, match="a group is called 'overall'"):
        GroupedMean(["overall"])


def test_two_ranks_give_the_mean_of_one_exactly(tmp_path):
    """101 samples on two ranks, 67 and 34 of them, one NaN: the same bits."""
    values, group, weight = samples()
    board_of_one, mean_of_one = measured(values, group, weight)

    def work():
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        rows = torch.arange(101)[:67] if rank == 0 else torch.arange(101)[67:]
        (tmp_path / str(rank)).write_text(json.dumps(measured(values[rows], group[rows], weight[rows])))
        distributed.destroy_process_group()

    run_ranks(work)
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [board_of_one, mean_of_one]


def measured(values, group, weight):
    board, metric = Scoreboard(["score"], ["score"]), GroupedMean(GROUPS, macro=True)
    board.update({"score": values}, weight > 0)
    metric.update(values, group, weight)
    return board.compute(), {name: float(value) for name, value in metric.compute().items()}


def test_rows_of_other_tasks_are_no_failures(caplog):
    board, counted = Scoreboard(["a", "b"], ["a"]), torch.ones(4, dtype=torch.bool)
    asked = torch.tensor([True, True, False, False])
    board.update({"a": Column(torch.tensor([1.0, 0.0, NAN, NAN]), asked), "b": torch.tensor([1.0, NAN, 1, 1])}, counted)
    assert board.compute() == {"a": 0.5, "b": 1.0, "average": 0.5}
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 scores of 'b' failed; its mean is over the others"
    ]


def test_a_macro_column_is_the_mean_of_its_parts_means():
    tags = ["g/few", "g/many", "g/none"]
    board = Scoreboard(["g", *tags], ["g"], {"g": tags})
    few, many = torch.tensor([1.0, NAN, NAN, NAN]), torch.tensor([NAN, 0.0, 0.0, 0.5])
    parts = {"g/few": Column(few, ~few.isnan()), "g/many": Column(many, ~many.isnan())}
    parts["g/none"] = Column(torch.full((4,), NAN), torch.zeros(4, dtype=torch.bool))
    board.update({"g": torch.tensor([1.0, 0.0, 0.0, 0.5])} | parts, torch.ones(4, dtype=torch.bool))
    assert board.compute()["g"] == pytest.approx((1 + 0.5 / 3) / 2)
    assert board.compute()["average"] == board.compute()["g"]


def test_a_macro_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no columns"):
        RewardCallback("geneval", tiny.Brightness(), macro=True)
