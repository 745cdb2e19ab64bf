"""The laws of rollouts as data: what an update holds, one seed for all, and sentences for what cannot be meant."""

import math
from collections import Counter
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer

from flowopd.prompts import Mixture
from flowopd.rollouts import Sampler
from flowopd.teachers import LoRATeacher
from flowopd.training import SFT, DriftMetrics, ImageGrid, OPDStudent, ResultsTable, RewardCallback, TeacherCallback

# ------------------------------------------------------------------------------------------------- what an update holds


class Policy(SimpleNamespace):
    """As much of a policy as its data asks for."""

    exchangeable = False
    device = "cpu"
    sampler = Sampler(4)
    backbone = SimpleNamespace(latent_shape=lambda: (1, 1, 1))

    def batches_per_rollout(self):
        return 3

    def unasked(self, key):
        return ()


def updates(data, ranks: int, count: int, exchangeable: bool = False) -> list[Counter]:
    """Keys of the rows and their batch of a rollout, in each of the updates of an iteration on all ranks together."""
    held = [Counter() for _ in range(count)]
    for rank in range(ranks):
        policy = Policy(exchangeable=exchangeable)
        batches = data.prompts_per_iteration // ranks * data.group_size // data.batch_size * 3
        accumulate, rest = divmod(batches, count)
        assert not rest
        trainer = {"world_size": ranks, "global_rank": rank, "accumulate_grad_batches": accumulate}
        data.trainer = SimpleNamespace(**trainer, lightning_module=policy)
        draws = data.draws()
        order = [(draw, step) for draw in draws for step in range(3)]
        order = sorted(order, key=lambda part: part[1]) if exchangeable else order
        for number, (draw, step) in enumerate(order):
            rows = zip(draw.noise.rows, draw.prompts, strict=True)
            held[number // accumulate].update((key, step, prompt.task, prompt.text) for key, prompt in rows)
    return held


SIZES = {  # prompts, siblings, rows of a batch for one rank, ratio, and updates of an iteration
    "an image per prompt": (24, 1, 24, {"red": 1, "green": 1}, 1),
    "two updates": (24, 1, 12, {"red": 1, "green": 1}, 2),
    "three to one": (32, 1, 4, {"red": 3, "green": 1}, 2),
    "siblings": (16, 4, 8, {"red": 3, "green": 1}, 2),
    "siblings in many batches": (8, 6, 2, {"red": 1, "green": 1}, 2),
    "a task alone": (8, 2, 4, {"red": 1}, 2),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("exchangeable", [False, True], ids=["steps", "draws"])
def test_an_update_holds_the_same_rows_on_any_number_of_ranks_and_each_task_by_its_share(sizes, exchangeable):
    prompts, siblings, rows, ratio, count = SIZES[sizes]
    seen = []
    for ranks in (1, 2, 4):
        size = math.gcd(prompts // ranks * siblings // count, rows)
        data = tiny.data(*ratio, prompts_per_iteration=prompts, group_size=siblings, batch_size=size, ratio=ratio)
        seen.append(updates(data, ranks, 3 * count if exchangeable else count, exchangeable))
    assert all(held == seen[0] for held in seen)
    for held in seen[0]:
        tasks = Counter(task for _, _, task, _ in held.elements())
        assert {task: share * sum(tasks.values()) // sum(ratio.values()) for task, share in ratio.items()} == tasks


def test_dealing_changes_no_row_but_only_where_it_is_trained():
    """A row's prompt and noise are those of its place in the mixture."""
    rows = {}
    for ranks, count in ((1, 1), (1, 4), (2, 2), (4, 2)):
        held = updates(tiny.data("red", "green", prompts_per_iteration=16, batch_size=2), ranks, count)
        rows[ranks, count] = sum(held, Counter())
    assert len(set(map(frozenset, rows.values()))) == 1


def test_with_one_update_the_prompts_of_a_task_stay_together():
    """A forward asks few teachers."""
    data = tiny.data("red", "green", prompts_per_iteration=16, batch_size=4)
    updates(data, 1, 1)
    assert [set(draw.tasks) for draw in data.draws()] == [{"red"}] * 4 + [{"green"}] * 4


def test_equal_parts_of_what_is_dealt_have_each_task_by_its_share():
    for ratio in ({"a": 1, "b": 1}, {"a": 3, "b": 1}, {"a": 3, "b": 2, "c": 1}, {"a": 5, "b": 0, "c": 1}):
        mixture = Mixture({task: tiny.Words(task) for task in ratio}, ratio)
        for parts in (1, 2, 3, 4, 6):
            count = 2 * parts * sum(ratio.values())
            prompts = mixture.draw(count, 0, 0)
            tasks = [prompts[index].task for index in mixture.dealt(count, 0)]
            size = count // parts
            for first in range(0, count, size):
                assert Counter(tasks[first : first + size]) == Counter({t: 2 * n for t, n in ratio.items() if n})
            assert sorted(mixture.dealt(count, 0)) == list(range(count))


# ---------------------------------------------------------------------------------------------------------------- seeds


@pytest.fixture
def said(monkeypatch):
    """Lines for the user."""
    lines = []
    monkeypatch.setattr("flowopd.training.rollout_data.rank_zero_info", lines.append)
    return lines


@pytest.fixture(autouse=True)
def run_seed(monkeypatch):
    """Give the run a seed, which the next test knows nothing of."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return partial(seed_everything, verbose=False)


def first_draw(data) -> tuple[list[str], torch.Tensor]:
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, accumulate_grad_batches=6, lightning_module=Policy(), max_epochs=1
    )
    draw = data.draws()[0]
    return draw.texts, draw.noise.start()


def test_one_seed_reaches_prompts_and_noise(run_seed):
    drawn = {}
    for run, own in ((0, None), (1, None), (0, 1), (1, 1), (5, 0)):
        run_seed(run)
        drawn[run, own] = first_draw(tiny.data(seed=own))
    for same in (((1, None), (0, 1)), ((1, None), (1, 1)), ((0, None), (5, 0))):
        (texts, noise), (texts_again, noise_again) = (drawn[key] for key in same)
        assert texts == texts_again
        assert torch.equal(noise, noise_again)
    (texts, noise), (other_texts, other_noise) = drawn[0, None], drawn[1, None]
    assert texts != other_texts
    assert not torch.equal(noise, other_noise)


@pytest.mark.parametrize(("own", "lines"), [(None, 0), (1, 0), (2, 1)])
def test_a_seed_of_its_own_is_said(fit, said, run_seed, own, lines):
    run_seed(1)
    fit(tiny.data(seed=own))
    assert said == ["prompts and noise follow data.seed 2, the rest seed_everything"] * lines


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.fixture
def fit(tiny_pipeline, tmp_path):
    """Fit, without a step if nothing else is wrong."""
    teacher = tiny.expert(tmp_path / "expert", tiny_pipeline)

    def run(data=None, callbacks=(), **options):
        policy = tiny.policy(OPDStudent, tiny_pipeline)
        callbacks = [TeacherCallback(["red"], LoRATeacher(teacher)), *callbacks]
        trainer = tiny.trainer(tmp_path, callbacks, **({"max_epochs": 0} | options))
        trainer.fit(policy, data or tiny.data())
        return trainer

    return run


MEANINGLESS = {  # of six batches in an iteration
    "limit_train_batches": ((1, 5, 0.5, 0, 0.0), "all 6 batches of an iteration are trained on"),
    "limit_val_batches": ((0.5,), "all 1 batches of held-out prompts are drawn, or none; give data.evaluation_count"),
    "fast_dev_run": ((True, 2), "would end inside an iteration; try `flowopd check`"),
    "overfit_batches": ((1, 0.5), "would train on the same batches again"),
    "accumulate_grad_batches": ((4, 5, 12), "does not divide the 6 batches of an iteration"),
    "max_steps": ((1, 5, 7), "ends inside an iteration of 6 updates; choose a multiple of 6, or trainer.max_epochs"),
    "max_time": (({"hours": 1},), "may end inside an iteration; add .*Timer with interval: epoch"),
    "val_check_interval": ((2, 0.5), "would validate inside an iteration; use trainer.check_val_every_n_epoch"),
    "reload_dataloaders_every_n_epochs": ((1, 2), "has nothing to reload"),
}
CASES = [(name, value) for name, (values, _) in MEANINGLESS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_limits_that_cannot_be_meant_are_refused_before_any_work(fit, name, value, monkeypatch):
    monkeypatch.setattr(OPDStudent, "configure_model", lambda policy: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=rf"trainer\.{name} .*{MEANINGLESS[name][1]}"):
        fit(**{name: value})


def test_an_accumulation_that_changes_must_divide_too(fit):
    with pytest.raises(ValueError, match=r"accumulate_grad_batches is 4, .* divide the 6 batches"):
        fit(callbacks=[GradientAccumulationScheduler({0: 3, 1: 4})])


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 6},
        {"limit_val_batches": 1},
        {"accumulate_grad_batches": 3, "max_steps": 4, "max_epochs": 2},
        {"callbacks": [Timer(timedelta(hours=1), interval="epoch")]},
        {"callbacks": [GradientAccumulationScheduler({0: 6, 1: 2})]},
    ],
    ids=["batches", "validation", "steps", "timer", "accumulation"],
)
def test_limits_that_leave_iterations_whole_are_meant(fit, options):
    fit(**options)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_some_of_the_held_out_prompts_are_not_scored_for_all(tiny_pipeline, tmp_path, verb):
    name = {"validate": "limit_val_batches"}.get(verb, f"limit_{verb}_batches")
    policy, data = tiny.policy(OPDStudent, tiny_pipeline), tiny.data(evaluation_batch_size=1)
    with pytest.raises(ValueError, match=rf"trainer.{name} is 2, but all 3 batches .* data.evaluation_count"):
        getattr(tiny.trainer(tmp_path, **{name: 2}), verb)(policy, data)
    with pytest.raises(ValueError, match=f"evaluation_count is 0, so there is nothing to {verb}; set it to 1 or more"):
        getattr(tiny.trainer(tmp_path), verb)(policy, tiny.data(evaluation_count=0))


def test_no_evaluation_is_asked_for_by_a_count_of_zero(fit, tmp_path):
    watching = [RewardCallback("red", tiny.Brightness()), ImageGrid(), DriftMetrics(), ResultsTable()]
    trainer = fit(tiny.data(evaluation_count=0), watching, max_epochs=2, limit_val_batches=1.0)
    assert trainer.global_step == 12
    assert not [name for name in trainer.callback_metrics if name.startswith(("val/", "drift/"))]
    assert not list(tmp_path.glob("results*"))
    assert not (tmp_path / "images").exists()


NUMBERS = ["prompts_per_iteration", "group_size", "batch_size", "evaluation_batch_size"]
WRONG = [(name, value) for name in NUMBERS for value in (0, -1, 2.5, math.nan, True)]
WRONG += [(name, value) for name in ("evaluation_count", "seed") for value in (-1, 0.5, math.nan)]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_every_number_of_the_data_has_a_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; expected "):
        tiny.data(**{name: value})


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        ({"red": 1, "gren": 1}, r"ratio names task 'gren' \(did you mean 'green'\?\), the prompts are of green, red"),
        ({"red": 1}, "ratio says nothing of task 'green', the prompts are of green, red"),
        ({"red": -1, "green": 1}, "share of red is -1; expected at least 0"),
        ({"red": 0.5, "green": 1}, "share of red is 0.5; expected a whole number of at least 0"),
        ({"red": math.nan, "green": 1}, "share of red is nan; expected a whole number"),
        ({"red": 0, "green": 0}, "one share at least must be above 0"),
    ],
    ids=str,
)
def test_shares_that_cannot_be_meant_are_refused(ratio, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.data("red", "green", ratio=ratio)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("num_steps", "eval_steps") for value in (0, -1, 1.5, math.nan)]
    + [("guidance_scale", value) for value in (-1.0, math.nan)],
    ids=str,
)
def test_every_number_of_a_sampler_has_a_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; expected "):
        Sampler(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("draws", 0), ("draws", 1.5), ("sigma_mean", math.nan), ("sigma_std", -1.0), ("temperature", 0.0)],
    ids=str,
)
def test_every_number_of_sft_has_a_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; expected "):
        SFT(**{name: value})
