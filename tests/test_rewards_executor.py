"""The laws of scoring in the background: it overlaps, and nothing else about a run changes."""

import gc
import json
import threading
import time
import weakref

import pytest
import tiny
import torch
from ranks import run_ranks

from flowopd.models import SD3Backbone
from flowopd.records import Prompt
from flowopd.rewards import Scores
from flowopd.rewards.executor import Executor
from flowopd.rewards.scorer import Scorer
from flowopd.training import GRPOTeacher, RewardCallback

PROMPTS = [Prompt("red 1", "red"), Prompt("red 2", "red")]


def red(images, prompts) -> Scores:
    return Scores(images[:, 0].mean((1, 2)))


# --------------------------------------------------------------------------------------------------------- the executor


def test_batches_come_back_in_order_and_are_scored_one_at_a_time():
    running, most = [], []

    def slow(images, prompts):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return red(images, prompts)

    executor = Executor(slow)
    batches = [torch.rand(2, 3, 4, 4) for _ in range(5)]
    futures = [executor.submit(batch, PROMPTS) for batch in batches]
    for batch, future in zip(batches, futures, strict=True):
        assert torch.equal(future.result().value, red(batch, PROMPTS).value)
    assert max(most) == 1
    executor.close()


def test_the_caller_goes_on_while_a_batch_is_scored():
    go_on = threading.Event()

    def patient(images, prompts):
        assert go_on.wait(10), "nobody went on"
        return red(images, prompts)

    executor = Executor(patient)
    future = executor.submit(torch.rand(2, 3, 4, 4), PROMPTS)
    assert not future.done()
    go_on.set()
    assert future.result().value.shape == (2,)
    executor.close()


def test_what_a_reward_raises_is_raised_where_its_scores_are_wanted():
    def failing(images, prompts):
        raise ValueError("no such thing; try another")

    executor = Executor(failing)
    with pytest.raises(ValueError, match="no such thing; try another"):
        executor.submit(torch.rand(2, 3, 4, 4), PROMPTS).result()
    executor.close()


def test_a_closed_executor_forgets_what_waits_and_can_begin_anew():
    go_on = threading.Event()
    executor = Executor(lambda images, prompts: go_on.wait(10) and red(images, prompts))
    _, waiting = (executor.submit(torch.rand(2, 3, 4, 4), PROMPTS) for _ in range(2))
    executor.close()
    go_on.set()
    assert waiting.cancelled()
    assert executor.submit(torch.rand(2, 3, 4, 4), PROMPTS).result().value.shape == (2,)
    executor.close()


def test_a_part_that_a_piece_lacks_is_nan_there():
    pieces = [Scores(torch.zeros(2)), Scores(torch.ones(1), {"exact": torch.ones(1)})]
    scores = Scores.cat(pieces)
    assert scores.value.tolist() == [0, 0, 1]
    assert scores.parts["exact"].isnan().tolist() == [True, True, False]


def test_nothing_joined_is_nothing():
    assert Scores.cat([]).value.shape == (0,)


# -------------------------------------------------------------------------------------------------------------- in runs


class Detailed(tiny.Brightness):
    """A colour's mean, with parts, that notes which thread asked; rows of one sibling in seven fail if told so."""

    def __init__(self, channel: int = 0, lost: bool = False):
        super().__init__(channel)
        self.lost, self.threads, self.asked = lost, set(), 0

    def detail(self, images, prompts):
        self.threads.add(threading.current_thread().name)
        value = super().score(images, prompts)
        failed = torch.tensor([self.lost and (self.asked + row) % 7 == 3 for row in range(len(prompts))])
        self.asked += len(prompts)
        return Scores(value.masked_fill(failed, torch.nan), {"bright": (value > 0.5).float()})


def fit(folder, pipeline, *callbacks, **options):
    """Two iterations of GRPO in four chunks each; the student's tensors and the figures."""
    torch.manual_seed(0)
    policy = tiny.policy(GRPOTeacher, pipeline, lr=3.0)
    trainer = tiny.trainer(folder, callbacks, max_epochs=2, **options)
    trainer.fit(policy, tiny.data("red", "green", group_size=4, batch_size=4))
    return policy.student().tensors, {name: float(value) for name, value in trainer.callback_metrics.items()}


def assert_same(first, second):
    assert first[1] == pytest.approx(second[1], nan_ok=True, abs=0)
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_to_the_bit_with_and_without(tiny_pipeline, tmp_path, precision):
    """Two rewards, one for a task alone and one that fails at times, beside one that never leaves the foreground."""

    def run(background: bool):
        rewards = Detailed(0), Detailed(1, lost=True), Detailed(2)
        callbacks = [
            RewardCallback("a", rewards[0], tasks=["red"], background=background),
            RewardCallback("b", rewards[1], weight=0.5, background=background),
            RewardCallback("c", rewards[2], weight=0.1),
        ]
        result = fit(tmp_path, tiny_pipeline, *callbacks, precision=precision)
        return result, [reward.threads for reward in rewards]

    (with_it, threads), (without, main) = run(True), run(False)
    assert_same(with_it, without)
    assert {name[:6] for name in threads[0] | threads[1]} == {"reward"}
    assert threads[2] == {"MainThread"} == main[0] == main[1]
    assert with_it[1]["reward/b/failed"] > 0


def test_a_chunk_is_scored_while_the_next_is_sampled(tiny_pipeline, tmp_path, monkeypatch):
    """The reward of the first chunk waits until the second has begun."""
    begun, seen = threading.Event(), []

    class Patient(tiny.Brightness):
        def score(self, images, prompts):
            seen.append(begun.wait(20))
            return super().score(images, prompts)

    rollouts, drawn = [], GRPOTeacher.rollout

    def rollout(self, draw):
        rollouts.append(draw)
        if len(rollouts) > 1:
            begun.set()
        return drawn(self, draw)

    monkeypatch.setattr(GRPOTeacher, "rollout", rollout)
    fit(tmp_path, tiny_pipeline, RewardCallback("a", Patient(), background=True))
    assert seen
    assert all(seen)


def test_an_error_in_the_background_ends_the_run_with_its_sentence(tiny_pipeline, tmp_path):
    class Failing:
        def score(self, images, prompts):
            raise ConnectionError("the reward server is gone")

    with pytest.raises(ConnectionError, match="the reward server is gone"):
        fit(tmp_path, tiny_pipeline, RewardCallback("a", Failing(), background=True))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward") and stays(thread)]


def stays(thread: threading.Thread) -> bool:
    thread.join(5)
    return thread.is_alive()


# ------------------------------------------------------------------------------------------------- failures and figures


def test_a_failed_score_has_no_advantage_and_leaves_the_batch_alone(tiny_pipeline, tmp_path):
    """Of two siblings the one without a score, of four the same: the others are compared with each other."""

    class Keep(GRPOTeacher):
        def label(self, rollouts, group_size):
            self.labelled = super().label(rollouts, group_size)
            return self.labelled

    class Half(tiny.Brightness):
        def score(self, images, prompts):
            lost = torch.arange(len(images)) % 4 == 1
            return super().score(images, prompts).masked_fill(lost, torch.nan)

    policy = tiny.policy(Keep, tiny_pipeline)
    trainer = tiny.trainer(tmp_path, [RewardCallback("a", Half())])
    trainer.fit(policy, tiny.data(group_size=4, batch_size=8))
    advantage = torch.cat([rollout.labels.advantage for rollout in policy.labelled])[:, 0].reshape(4, 4)
    assert (advantage[:, 1] == 0).all()
    assert (advantage[:, [0, 2, 3]].abs() > 0).all()
    torch.testing.assert_close(advantage.sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    assert trainer.callback_metrics["reward/a/failed"] == 4
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert all(value.isfinite().all() for value in policy.student().tensors.values())


class Gone:
    """A reward that never gives a number."""

    def score(self, images, prompts):
        return torch.full((len(images),), torch.inf)  # as good as none


@pytest.mark.parametrize("background", [False, True])
def test_an_iteration_that_a_reward_cannot_judge_at_all_ends_the_run(tiny_pipeline, tmp_path, background):
    rewards = [RewardCallback("good", tiny.Brightness()), RewardCallback("a", Gone(), background=background)]
    with pytest.raises(ValueError, match=r"^reward 'a' failed for all 16 pictures that it was asked about"):
        fit(tmp_path, tiny_pipeline, *rewards)


def test_one_task_s_failure_leaves_the_others_rows_alone(tiny_pipeline, tmp_path):
    """A reward of another task, and parts that are not there, were never asked: no failure."""
    callbacks = [RewardCallback("a", Detailed()), RewardCallback("none", Gone(), weight=0.0)]
    _, figures = fit(tmp_path, tiny_pipeline, *callbacks)
    assert not [name for name in figures if name.endswith("failed")]


def test_ranks_that_met_different_parts_log_the_same(tiny_pipeline, tmp_path):
    """The reward of one task sees rows of the first rank alone; a failure of any rank is counted once."""

    def figures(name: str, **options):
        class Parts(tiny.Brightness):
            def detail(self, images, prompts):
                value = super().score(images, prompts)
                first = torch.arange(len(prompts)) == 0
                return Scores(value.masked_fill(first, torch.nan), {prompts[0].task: value})

        data = tiny.data("red", "green", group_size=2, batch_size=4)
        callbacks = [RewardCallback(task, Parts(), tasks=[task]) for task in ("red", "green")]
        trainer = tiny.trainer(tmp_path, callbacks, **options)
        trainer.fit(tiny.policy(GRPOTeacher, tiny_pipeline, lr=0.0), data)
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("reward/")}
        (tmp_path / f"{name}{trainer.global_rank}").write_text(json.dumps(logged))

    figures("one")
    run_ranks(lambda: figures("two", strategy="ddp", devices=2))
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("one0", "two0", "two1"))
    assert {"reward/red/red", "reward/green/green", "reward/red/failed"} <= one.keys()
    for rank in two:
        assert rank.keys() == one.keys()
        assert rank["reward/red/red"] == pytest.approx(one["reward/red/red"], abs=1e-6)


def test_parts_are_logged_and_are_columns_if_asked_for(tiny_pipeline, tmp_path):
    callbacks = [RewardCallback("a", Detailed(), columns=["bright"]), RewardCallback("b", Detailed(1))]
    _, figures = fit(tmp_path, tiny_pipeline, *callbacks, limit_val_batches=1.0)
    assert {"reward/a", "reward/a/bright", "reward/b", "reward/b/bright"} <= figures.keys()
    assert {name for name in figures if name.startswith("val/")} == {"val/a", "val/a/bright", "val/b", "val/average"}
    assert not [name for name in figures if name.endswith("failed")]


def test_too_many_failures_in_an_evaluation_are_told(tiny_pipeline, tmp_path, caplog):
    policy = tiny.policy(GRPOTeacher, tiny_pipeline)
    callbacks = [RewardCallback("a", Detailed(lost=True), tasks=["red"]), RewardCallback("b", Detailed())]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1.0)
    scores = trainer.validate(policy, tiny.data("red", "green", evaluation_count=8), verbose=False)[0]
    assert "1 of 8 scores of 'a' failed; its mean is over the others" in caplog.text
    assert "'b'" not in caplog.text
    assert 0 < scores["val/a"] < 1


ANSWERS = {  # what a reward answers for four images, and what is said of it
    "a list": ([0.5] * 4, r"Odd.score returned a list; expected a tensor of shape \(4,\)"),
    "a number": (0.5, r"Odd.score returned a float; expected a tensor of shape \(4,\)"),
    "nothing": (None, r"Odd.score returned a NoneType"),
    "one score": (torch.zeros(1), r"Odd.score returned torch.float32 of shape \(1,\)"),
    "one number": (torch.tensor(0.5), r"Odd.score returned torch.float32 of shape \(\)"),
    "a column": (torch.zeros(4, 1), r"Odd.score returned torch.float32 of shape \(4, 1\)"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_is_not_one_score_per_image_is_refused(kind):
    answer, said = ANSWERS[kind]

    class Odd:
        def score(self, images, prompts):
            return answer

    with pytest.raises(ValueError, match=said):
        Scorer("a", Odd()).score(torch.rand(4, 3, 8, 8), PROMPTS * 2)


def test_no_more_pictures_are_kept_than_one_rollout_has(tiny_pipeline, tmp_path, monkeypatch):
    decoded, alive = [], []
    own = SD3Backbone.decode

    def decode(self, latents):
        gc.collect()
        alive.append(sum(picture() is not None for picture in decoded))
        images = own(self, latents)
        decoded.append(weakref.ref(images))
        return images

    monkeypatch.setattr(SD3Backbone, "decode", decode)
    fit(tmp_path, tiny_pipeline, RewardCallback("a", tiny.Brightness(0)), RewardCallback("b", tiny.Brightness(1)))
    assert len(decoded) == 8
    assert max(alive) == 0
