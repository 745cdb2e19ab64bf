"""The laws of what callbacks carry: plain objects, collected once, for tasks of the run; one judge for all."""

import json
import math
import sys
from functools import partial
from inspect import Parameter, signature

import pytest
import tiny
import torch
from ranks import run_ranks

from flowopd.cli.main import main
from flowopd.core import TransitionKL
from flowopd.models import LoRASpec
from flowopd.rewards import Judging, Scorer
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, Role, Teaching
from flowopd.training import (
    SFT,
    ColdStart,
    GRPOTeacher,
    OPDStudent,
    RewardCallback,
    TeacherCallback,
)
from flowopd.training.signals import signals_among

RED = partial(RewardCallback, "red", tiny.Brightness())
BASE = BaseTeacher()


class Half(tiny.Brightness):
    """A colour's mean that fails for every prompt "red 0" and "red 2"."""

    def score(self, images, prompts):
        lost = torch.tensor([prompt.text in ("red 0", "red 2") for prompt in prompts])
        return super().score(images, prompts).masked_fill(lost, torch.nan)


class Gone:
    """A reward that never gives a number."""

    def score(self, images, prompts):
        return torch.full((len(images),), torch.nan)


@pytest.fixture
def policies(tiny_pipeline):
    """The two algorithms that judge pictures, sampling alike."""

    def make(kind: str):
        torch.manual_seed(0)
        if kind == "grpo":
            return tiny.policy(GRPOTeacher, tiny_pipeline)
        options = {"sampler": Sampler(num_steps=4), "lora": LoRASpec(rank=4, alpha=8)}
        return ColdStart(tiny.backbone(tiny_pipeline), SFT(source="self", keep="best"), **options)

    return make


# ------------------------------------------------------------------------------------------------------------ collected


def test_signals_are_collected_once_for_a_trainer(tiny_pipeline, tmp_path):
    policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL())
    for reward in (RED(), RewardCallback("other", tiny.Brightness())):
        policy.trainer = tiny.trainer(tmp_path, [reward])
        assert policy.signals is policy.signals
        assert policy.signals.judging.scorers == [reward.scorer]
        assert policy.scoreboard.columns == [reward.scorer.name]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Scorer("a", Gone(), weight=math.nan), "the weight of reward 'a' is nan; expected a finite number"),
        (lambda: Scorer("a", Gone(), tasks=[]), "reward 'a' scores no task; name some in `tasks`, or leave it out"),
        (lambda: RewardCallback("a", Gone(), macro=True), "reward 'a' is a macro mean of no columns"),
        (lambda: Judging([Scorer("a", Gone()), Scorer("a", Gone())]), "more than one reward 'a'; expected one"),
        (lambda: Judging([Scorer("average", Gone())]), "more than one column 'average'; expected one"),
        (
            lambda: Judging([Scorer("a", Gone(), columns=["b"]), Scorer("a/b", Gone())]),
            "more than one column 'a/b'; expected one",
        ),
        (lambda: TeacherCallback([], BASE), "a TeacherCallback teaches no task; name some in `tasks`"),
        (lambda: Teaching([Role("a", BASE, ["red", "red"])]), "more than one teacher for task 'red'; expected one"),
        (lambda: Teaching([Role("a", BASE, ["red"])], Role("a", BASE)), "more than one teacher of the name 'a'"),
    ],
    ids=range(9),
)
def test_what_cannot_be_meant_is_refused_where_it_is_given(build, said):
    with pytest.raises(ValueError, match=said):
        build()


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("callback", "owner"),
    [(RED(tasks=["red", "rde"]), "reward 'red'"), (TeacherCallback(["rde"], BASE, "painter"), "teacher 'painter'")],
    ids=["reward", "teacher"],
)
def test_a_task_that_the_run_does_not_have_is_named_with_the_one_that_is_meant(
    callback, owner, tiny_pipeline, tmp_path
):
    said = rf"^{owner} is for task 'rde' \(did you mean 'red'\?\), which this run does not have; .* 'red', 'green'$"
    for work in ("fit", "validate"):
        policy = tiny.policy(GRPOTeacher, tiny_pipeline)
        trainer = tiny.trainer(tmp_path, [callback, RewardCallback("any", tiny.Brightness())])
        with pytest.raises(ValueError, match=said):
            getattr(trainer, work)(policy, tiny.data("red", "green"))


def test_a_task_that_is_only_evaluated_may_have_rewards_and_teachers():
    signals = signals_among([RED(tasks=["held out"]), TeacherCallback(["held out"], BASE)])
    signals.require_tasks(["red", "held out"])


# -------------------------------------------------------------------------------------------------------------- judging


def figures(policy, folder, name: str, **options) -> None:
    """Fit an iteration with a reward that fails for some prompts, and write what was logged of it."""
    trainer = tiny.trainer(folder, [RewardCallback("half", Half())], **options)
    trainer.fit(policy, tiny.data(group_size=2, batch_size=2))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.split("/")[0] in ("reward", "sft")}
    (folder / f"{name}{trainer.global_rank}").write_text(json.dumps(logged))


def test_a_reward_means_the_same_in_grpo_and_in_a_cold_start_exactly_over_ranks(policies, tmp_path):
    """The ranks know of unequally many scores, so a mean of their means would be another number."""
    for kind in ("grpo", "cold start"):
        figures(policies(kind), tmp_path, kind)
        run_ranks(lambda kind=kind: figures(policies(kind), tmp_path, f"{kind} two ", strategy="ddp", devices=2))
    names = ("grpo0", "grpo two 0", "grpo two 1", "cold start0", "cold start two 0", "cold start two 1")
    logged = [json.loads((tmp_path / name).read_text()) for name in names]
    for one in logged:
        assert one["reward/half"] == pytest.approx(logged[0]["reward/half"], abs=1e-6)
        assert one["reward/half/failed"] == logged[0]["reward/half/failed"] > 0
    for one in logged[4:]:
        assert one["sft/kept_reward"] == pytest.approx(logged[3]["sft/kept_reward"], abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "cold start"])
def test_a_reward_that_fails_for_ever_ends_the_run(policies, kind, tmp_path):
    with pytest.raises(ValueError, match="reward 'gone' failed for all 8 pictures that it was asked about"):
        tiny.trainer(tmp_path, [RED(), RewardCallback("gone", Gone())]).fit(policies(kind), tiny.data())


@pytest.mark.parametrize("kind", ["grpo", "cold start"])
@pytest.mark.parametrize("background", [False, True])
def test_pictures_are_decoded_once_and_shown_to_whoever_watches(policies, kind, background, tmp_path):
    class Eyes(list):
        def see(self, images):
            self.append(images)

    policy, eyes = policies(kind), Eyes()
    policy.watchers.append(eyes)
    decode, decoded = policy.backbone.decode, []
    policy.backbone.decode = lambda latents: decoded.append(decode(latents)) or decoded[-1]
    tiny.trainer(tmp_path, [RED(background=background)], max_epochs=2).fit(policy, tiny.data())
    assert len(eyes) == len(decoded) == 4  # two batches in each of two iterations
    assert all(seen is made for seen, made in zip(eyes, decoded, strict=True))


# ---------------------------------------------------------------------------------------------------------- evaluations


def test_a_column_that_nothing_could_score_is_remembered_and_told(policies, tmp_path, caplog):
    policy, callbacks = policies("grpo"), [RED(), RewardCallback("gone", Gone(), weight=0.0)]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1.0)
    scores = trainer.validate(policy, tiny.data(evaluation_count=3), verbose=False)[0]
    assert math.isnan(scores["val/gone"])
    assert "all 3 scores of 'gone' failed; its mean is NaN" in caplog.text
    assert policy.unscored == {"val": ["gone"]}


def test_a_part_that_no_picture_has_is_told(policies, tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, [RED(columns=["brigth"])], limit_val_batches=1.0)
    trainer.validate(policies("grpo"), tiny.data(), verbose=False)
    assert "there is no score of 'red/brigth'; its mean is NaN" in caplog.text


GONE = """
from collections.abc import Sequence
import torch
from flowopd import Prompt

class Gone:
    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return torch.full((len(images),), torch.nan)
"""


def test_a_command_whose_reward_fails_for_ever_ends_with_an_error_after_its_table(
    tiny_pipeline, tmp_path, monkeypatch, capsys
):
    (tmp_path / "gone.py").write_text(GONE)
    (tmp_path / "red.txt").write_text("red 0\nred 1\nred 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"""
model:
  class_path: flowopd.OPDStudent
  init_args:
    backbone: {{class_path: flowopd.SD3Backbone, init_args: {{path: {tiny_pipeline}, dtype: float32}}}}
    lora: {{rank: 4}}
    sampler: {{class_path: flowopd.Sampler, init_args: {{num_steps: 2}}}}
data:
  class_path: flowopd.RolloutDataModule
  init_args:
    prompts: {{red: {{class_path: flowopd.PromptFile, init_args: {{path: red.txt, task: red}}}}}}
    evaluation_prompts: {{red: {{class_path: flowopd.PromptFile, init_args: {{path: red.txt, task: red}}}}}}
    evaluation_count: 3
trainer:
  accelerator: cpu
  default_root_dir: run
  callbacks:
    - {{class_path: flowopd.RewardCallback, init_args: {{name: gone, reward: {{class_path: gone.Gone}}}}}}
    - {{class_path: flowopd.ResultsTable}}
"""
    )
    monkeypatch.setattr(sys, "argv", ["flowopd", "test", "--config", "run.yaml"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "flowopd: error: every score of 'gone' failed; what is written has NaN there" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.csv").is_file()


# --------------------------------------------------------------------------------------------------------- constructors


@pytest.mark.parametrize("kind", [OPDStudent, GRPOTeacher, ColdStart])
def test_an_algorithm_says_only_its_own_and_takes_what_every_policy_takes(kind):
    from jsonargparse import ArgumentParser

    from flowopd.training import FlowPolicy

    everyone = set(signature(FlowPolicy).parameters) - ({"objective", "start"} if kind is ColdStart else set())
    own = {name for name, p in signature(kind).parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    assert not own & (everyone - {"backbone", "objective"})
    assert set(ArgumentParser().add_class_arguments(kind)) == own | everyone
    with pytest.raises(TypeError, match="lorra"):
        kind(None, **({"strategy": SFT()} if kind is ColdStart else {}), lorra=LoRASpec())
