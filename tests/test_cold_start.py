"""The laws of cold starts: which pictures count and by how much, one gradient whatever is left out, and reports."""

from functools import partial

import pytest
import tiny
import torch
from lightning import Callback
from torch import nan

from flowopd.core import FlowMatching, Labels
from flowopd.models import LoRASpec, Merge
from flowopd.models.adapters.files import WEIGHTS, read_adapter
from flowopd.records import Conditioning, Prompt
from flowopd.rollouts import RowNoise, Sampler
from flowopd.teachers import LoRATeacher
from flowopd.training import SFT, AdapterExport, ColdStart, MergeReport, OPDStudent, RewardCallback, TeacherCallback

BEST = SFT(source="self", keep="best")
SOFT = SFT(source="self", keep="softmax", temperature=0.5)
RED = partial(RewardCallback, "red", tiny.Brightness())


@pytest.fixture
def cold_start(tiny_pipeline):
    def make(strategy, **options) -> ColdStart:
        options = {"sampler": Sampler(num_steps=4), "lora": LoRASpec(rank=4, alpha=8)} | options
        return ColdStart(tiny.backbone(tiny_pipeline), strategy, **options)

    return make


def weights(strategy: SFT, *rewards: float, group_size: int = 4) -> list[float]:
    return strategy.weights(torch.tensor(rewards), group_size).tolist()


# ------------------------------------------------------------------------------------------------------------- weights


def test_the_best_of_a_group_counts_for_all_of_it():
    assert weights(BEST, 0.1, 0.9, 0.3, 0.2, 5.0, 1.0, 2.0, 3.0) == [0, 4, 0, 0, 4, 0, 0, 0]


def test_equals_share():
    assert weights(BEST, 0.9, 0.9, 0.3, 0.2) == [2, 2, 0, 0]
    assert weights(BEST, 0.3, 0.3, 0.3, 0.3) == weights(SOFT, 0.3, 0.3, 0.3, 0.3) == [1, 1, 1, 1]


def test_the_softmax_is_that_of_the_reward():
    rewards = torch.tensor([0.1, 0.9, -0.3])
    expected = 3 * torch.exp(rewards / 0.5) / torch.exp(rewards / 0.5).sum()
    assert weights(SOFT, *rewards.tolist(), group_size=3) == pytest.approx(expected.tolist())
    assert weights(SOFT, *(rewards + 1000).tolist(), group_size=3) == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_cold_softmax_is_the_best_and_a_hot_one_is_everybody():
    cold, hot = (SFT(source="self", keep="softmax", temperature=t) for t in (1e-4, 1e4))
    assert weights(cold, 0.1, 0.9, 0.3, 0.2) == pytest.approx([0, 4, 0, 0])
    assert weights(hot, 0.1, 0.9, 0.3, 0.2) == pytest.approx([1, 1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("strategy", [BEST, SOFT], ids=["best", "softmax"])
def test_what_could_not_be_scored_does_not_count(strategy):
    known = weights(strategy, 0.2, 0.5, group_size=2)
    assert weights(strategy, nan, 0.2, nan, 0.5) == [0, 2 * known[0], 0, 2 * known[1]]
    assert weights(strategy, nan, nan, nan, nan) == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ gradients


def rollout(weight):
    """Eight finished trajectories, of which each has a weight."""
    rows = range(8)
    noise = RowNoise((4, 8, 8), rows, rows)
    cond = Conditioning(torch.arange(8.0).reshape(8, 1, 1), torch.zeros(8, 1))
    drawn = Sampler(2).rollout(lambda x, sigma, cond: x, [Prompt(str(i), "red") for i in rows], cond, noise)
    return (drawn if weight is None else drawn.label(weight=weight[:, None].expand(-1, 2))), noise


@pytest.mark.parametrize("weight", [[4, 0, 0, 0, 0, 0, 4, 0], [0.5, 1.5, 1, 1, 0, 4, 0, 0]], ids=["best", "softmax"])
def test_leaving_out_what_has_no_weight_changes_no_gradient(weight):
    """L = Σ_b w_b ‖v - target_b‖² / B over all rows, also over those that are left."""
    weight = torch.tensor(weight, dtype=torch.float32)
    (all_rows, noise), (some, _) = rollout(None), rollout(weight)
    for whole, left in zip(SFT(draws=2).batches(all_rows, noise), SFT(draws=2).batches(some, noise), strict=True):
        assert len(left.x) == (weight > 0).sum() == len(left.tasks) == len(left.cond)
        assert left.cond.tokens.flatten().tolist() == weight.nonzero().flatten().tolist()
        scale = torch.ones(4, 1, 1, requires_grad=True)
        errors = (scale * whole.x - whole.labels.target).square().mean((1, 2, 3))
        expected = torch.autograd.grad((weight * errors).sum() / 8, scale)[0]
        step = Sampler(2).transition(left, scale * left.x)
        found = torch.autograd.grad(FlowMatching().loss(step, left.labels)[0], scale)[0]
        torch.testing.assert_close(found, expected)


def test_where_nothing_counts_a_forward_is_made_and_nothing_is_learnt():
    """Every rank runs as many forwards."""
    drawn, noise = rollout(torch.zeros(8))
    (batch,) = SFT(draws=1).batches(drawn, noise)
    assert len(batch.x) == 1
    assert FlowMatching().loss(Sampler(2).transition(batch, batch.x), batch.labels)[0] == 0


def test_weights_of_one_are_no_weights():
    drawn, noise = rollout(torch.ones(8))
    (weighty,), (plain,) = (list(SFT(draws=1).batches(r, noise)) for r in (drawn, rollout(None)[0]))
    step = Sampler(2).transition(plain, plain.x)
    loss, same = (FlowMatching().loss(step, labels)[0] for labels in (plain.labels, weighty.labels))
    assert plain.labels.weight is None
    torch.testing.assert_close(loss, same)
    assert torch.equal(FlowMatching().loss(step, Labels(target=plain.labels.target))[0], loss)


# ----------------------------------------------------------------------------------------------------------------- runs


class Watch(Callback):
    """Rows of every batch, and the metrics of every iteration."""

    def __init__(self):
        self.rows, self.metrics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(len(batch.x))

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_student_learns_from_the_best_of_its_own_pictures(cold_start, tmp_path):
    """Without any teacher; one of eight pictures costs a forward."""
    targets = ["attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2", "proj_out"]
    options = {"lora": LoRASpec(8, 16, targets), "optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    policy, data = cold_start(SFT(source="self", keep="best"), **options), tiny.data(group_size=8, batch_size=32)
    watch = Watch()
    tiny.trainer(tmp_path, [RED(), watch], max_epochs=12).fit(policy, data)
    assert watch.rows == [4] * 4 * 12
    assert all(metrics["sft/kept_reward"] > metrics["reward/red"] for metrics in watch.metrics)
    assert watch.metrics[-1]["reward/red"] > watch.metrics[0]["reward/red"] + 0.01


def test_one_may_choose_among_the_teachers_pictures_as_well(cold_start, tiny_pipeline, tmp_path):
    teacher = TeacherCallback(["red"], LoRATeacher(tiny.expert(tmp_path / "expert", tiny_pipeline, std=0.5)))
    kept = {}
    for keep in ("all", "best"):
        watch = Watch()
        policy = cold_start(SFT(draws=1, keep=keep))
        tiny.trainer(tmp_path, [teacher, RED(), watch]).fit(policy, tiny.data())
        kept[keep] = watch
    assert kept["all"].rows == [4, 4]
    assert kept["best"].rows == [2, 2]
    assert "sft/kept_reward" not in kept["all"].metrics[0]


def test_siblings_may_be_spread_over_batches(cold_start, tmp_path):
    watch = Watch()
    tiny.trainer(tmp_path, [RED(), watch]).fit(cold_start(SFT(2, source="self", keep="best")), tiny.data(batch_size=1))
    assert watch.rows == [1] * 16


# -------------------------------------------------------------------------------------------------------------- reports


def test_a_merge_writes_its_report(cold_start, tiny_pipeline, tmp_path, capsys):
    experts = [tiny.expert(tmp_path / name, tiny_pipeline, seed=seed) for seed, name in enumerate(("text", "count"))]
    merge = Merge(experts, "factors")
    tiny.trainer(tmp_path / "run", [AdapterExport(), MergeReport()], max_epochs=0).fit(cold_start(merge), tiny.data())
    lines = (tmp_path / "run" / "merge_report.md").read_text().splitlines()
    assert lines[0] == "| model | weight | norm | cosine to text | cosine to count | kept |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| text", "| count", "| merge"]
    assert float(lines[2].split(" | ")[-1].strip(" |")) == pytest.approx(merge.report()["text"]["kept"], abs=1e-3)
    assert (tmp_path / "run" / "merge_report.csv").read_text().startswith("model,weight,norm")
    assert capsys.readouterr().out.count("kept") == 1
    assert (tmp_path / "run" / "adapter" / WEIGHTS).is_file()
    assert read_adapter(str(tmp_path / "run" / "adapter")).fingerprint() == merge.adapter().fingerprint()
    assert "method='factors'" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_student_that_starts_from_a_merge_can_report_it_too(tiny_pipeline, tmp_path, capsys):
    expert = tiny.expert(tmp_path / "expert", tiny_pipeline)
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=Merge([expert]))
    callbacks = [TeacherCallback(["red"], LoRATeacher(expert)), MergeReport()]
    tiny.trainer(tmp_path, callbacks).fit(policy, tiny.data())
    row = (tmp_path / "merge_report.md").read_text().splitlines()[2].strip("| ").split(" | ")
    assert [row[0], row[1], *row[3:]] == ["expert", "1.000", "1.000", "1.000"]
    assert "kept" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "self"}, "SFT on all of its own pictures teaches a model nothing; set keep to best or softmax"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0.0"),
    ],
)
def test_strategies_that_make_no_sense_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SFT(**arguments)


def test_choosing_without_a_reward_is_refused(cold_start, tmp_path):
    with pytest.raises(ValueError, match="no reward with a weight for task 'red'; add a RewardCallback for it"):
        tiny.trainer(tmp_path, [RED(weight=0.0)]).fit(cold_start(BEST), tiny.data())


def test_choosing_without_siblings_is_refused(cold_start, tmp_path):
    with pytest.raises(ValueError, match="keep: softmax chooses among siblings, but group_size is 1; set 2 or more"):
        tiny.trainer(tmp_path, [RED()]).fit(cold_start(SOFT), tiny.data(group_size=1))


def test_a_fused_cold_start_is_refused(cold_start, tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot provide \['weight'\], which only finished ones have .*; set fused: false"
    ):
        tiny.trainer(tmp_path, [RED()]).fit(cold_start(BEST), tiny.data(fused=True))
