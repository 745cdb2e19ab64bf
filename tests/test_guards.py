"""The laws of alarms: what is bad is seen, said in a sentence and not saved; drift is measured against the start."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from flowopd.core import Anchored, GroupAdvantage, TransitionKL
from flowopd.evaluation import drift
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import AnchorCallback, GRPOTeacher, OPDStudent, RewardCallback, TeacherCallback
from flowopd.training.callbacks.drift import DriftMetrics
from flowopd.training.callbacks.guard import Alarm, Guard

# ------------------------------------------------------------------------------------------------------------- figures


def flat(value: float, count: int = 2) -> torch.Tensor:
    return torch.full((count, 3, 8, 8), value)


def stripes(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Columns that alternate."""
    columns = torch.tensor([low, high]).repeat(4)
    return columns.expand(1, 3, 8, 8)


def test_a_flat_picture_has_no_edge_no_detail_and_one_colour():
    figures = drift.drift_figures(flat(0.5))
    assert figures == {"dark_fraction": 0, "edge_density": 0, "colour_entropy": 0, "sharpness": 0, "diversity": 0}


def test_a_black_picture_is_dark_everywhere():
    assert drift.dark_fraction(flat(0.0)).tolist() == [1, 1]


def test_stripes_are_edges_everywhere_and_one_bit_of_colour():
    assert drift.edge_density(stripes()).item() == 1
    assert drift.colour_entropy(stripes()).item() == pytest.approx(1)
    assert drift.dark_fraction(stripes()).item() == pytest.approx(0.5)


def test_sharpness_is_the_mean_square_of_the_laplacian():
    # in stripes of height h the two neighbours beside differ by h, so |ΔY| = 2h everywhere
    assert drift.sharpness(stripes(0.0, 0.5)).item() == pytest.approx(1.0, abs=1e-5)


def test_luma_of_white_is_one():
    torch.testing.assert_close(drift.luma(flat(1.0)), torch.ones(2, 8, 8))


def test_entropy_of_every_colour_once_is_nine_bits():
    levels = (torch.arange(8) + 0.5) / 8
    picture = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 16, 32)
    assert drift.colour_entropy(picture).item() == pytest.approx(9)


def test_diversity_is_the_spread_between_pictures():
    assert drift.diversity(torch.cat([flat(0.0, 1), flat(1.0, 1)])).item() == pytest.approx(0.5)
    assert drift.diversity(torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)).item() == pytest.approx(0, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- alarms


class Spoil(Callback):
    """Breaks something when a given update is due."""

    def __init__(self, update: int, spoil) -> None:
        self.update = update
        self.spoil = spoil

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.update:
            self.spoil(pl_module)


def nan_gradient(module) -> None:
    next(p for p in module.parameters() if p.requires_grad).grad.fill_(math.nan)


def nan_weight(module) -> None:
    next(p for p in module.parameters() if p.requires_grad).data.fill_(math.inf)


class BadLoss(TransitionKL):
    """A loss that is no number once it was asked often enough; its gradient is one."""

    asked = 0

    def loss(self, student, labels):
        self.asked += 1
        loss, metrics = super().loss(student, labels)
        return loss + (math.nan if self.asked > 3 else 0), metrics


@pytest.fixture
def student(tiny_pipeline, tmp_path):
    """An OPD student of three updates per iteration, with the callbacks that teach it."""

    def build(objective=None, **options):
        policy = tiny.policy(OPDStudent, tiny_pipeline, objective or TransitionKL(), **options)
        teacher = LoRATeacher(tiny.expert(tmp_path / "teacher", tiny_pipeline))
        return policy, [TeacherCallback(["red"], teacher)]

    return build


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_on_train_epoch_end=True, save_last="link")


def fit(folder, policy, callbacks, epochs: int = 3, **options):
    trainer = tiny.trainer(folder, [*callbacks, saver(folder)], epochs, enable_checkpointing=True, **options)
    trainer.fit(policy, tiny.data(group_size=1))
    return trainer


def weights_of(policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters() if p.requires_grad]


def finite(tensors) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


ALARMS = {  # what breaks in the second iteration, and what is said
    "gradient": (nan_gradient, r"iteration 2: the gradient is not finite \(.*lora_A.*\) in update 5, which was not"),
    "weights": (nan_weight, r"iteration 2: the trained weights are not finite"),
}


@pytest.mark.parametrize("kind", ALARMS)
def test_an_alarm_stops_before_a_bad_state_is_saved(student, tmp_path, kind):
    spoil, said = ALARMS[kind]
    policy, callbacks = student()
    with pytest.raises(Alarm, match=said) as stopped:
        fit(tmp_path, policy, [*callbacks, Spoil(4 if kind == "gradient" else 5, spoil), Guard()])
    assert str(tmp_path / "checkpoints" / "last.ckpt") in str(stopped.value)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["epoch"] == 0
    assert finite(content["state_dict"].values())


def test_a_loss_that_is_no_number_stops(student, tmp_path):
    policy, callbacks = student(BadLoss())
    with pytest.raises(Alarm, match=r"^stopped in iteration 2: the loss is not a finite number in update 4"):
        fit(tmp_path, policy, [*callbacks, Guard()])
    assert finite(weights_of(policy))


def test_before_the_first_checkpoint_the_alarm_says_that_there_is_none(student, tmp_path):
    policy, callbacks = student()
    with pytest.raises(Alarm, match="there is no checkpoint yet"):
        fit(tmp_path, policy, [*callbacks, Spoil(0, nan_gradient), Guard()])


def test_a_warning_leaves_the_bad_update_out_and_keeps_the_checkpoint(student, tmp_path):
    policy, callbacks = student()
    with pytest.warns(UserWarning, match=r"iteration 2: the gradient is not finite .* kept as .*good.ckpt"):
        fit(tmp_path, policy, [*callbacks, Spoil(4, nan_gradient), Guard(on_alarm="warn")])
    assert finite(weights_of(policy))
    assert torch.load(tmp_path / "checkpoints" / "good.ckpt", weights_only=True)["epoch"] == 0
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_healthy_run_is_the_same_with_a_guard(student, tmp_path):
    ends = []
    for folder, guards in (("a", []), ("b", [Guard(), DriftMetrics(2)])):
        policy, callbacks = student()
        torch.manual_seed(0)
        fit(tmp_path / folder, policy, [*callbacks, *guards], limit_val_batches=1)
        ends.append(weights_of(policy))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_student_that_runs_away_from_its_teacher_stops(student, tmp_path):
    policy, callbacks = student(lr=3e3)
    with pytest.raises(Alarm, match=r"velocity_mse is .*, more than 1.5 times the .* of the first iterations"):
        fit(tmp_path, policy, [*callbacks, Guard(growth=1.5, warm_up=1)], epochs=8, gradient_clip_val=0)


def test_limits_on_other_metrics_hold(student, tmp_path):
    policy, callbacks = student(Anchored(TransitionKL()))
    with pytest.raises(Alarm, match=r"anchor/loss is .*, beyond its limit of 1e-12"):
        fit(tmp_path, policy, [*callbacks, AnchorCallback(BaseTeacher(2.0)), Guard(limits={"anchor/loss": 1e-12})])


def alarms(name: str, values: list[float], **options) -> list[int]:
    """The iterations in which a guard raises the alarm."""
    guard = Guard(**options)
    return [i for i, value in enumerate(values) if guard._fault(name, value, i) is not None]


DRAWN = [0.14, 0.53, 1.27, 0.5, 0.09, 1.3, 0.4, 0.53, 1.1, 0.2, 1.4, 0.14, 1.27]  # what differs is the drawn steps
HEALTHY = {
    "steps that are drawn anew": ("anchor/loss", DRAWN),
    "a student that starts at its anchor": ("anchor/loss", [0.0] * 10 + [0.4, 0.9, 1.5, 1.9]),
    "a student that starts at its teacher": ("distill/velocity_mse", [0.0, 0.01, 0.04] + [0.05] * 10),
    "noise levels of unlike errors": ("distill/velocity_mse", [0.02, 0.3, 0.02, 0.3, 0.25] * 4),
    "teachers far away": ("distill/velocity_mse", [1.6, 1.0, 0.84, 0.75, 0.63, 1.0] * 4),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_raises_no_alarm(kind):
    assert alarms(*HEALTHY[kind]) == []


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("last", [50.0, math.nan, math.inf])
def test_a_distance_that_explodes_after_a_healthy_start_is_an_alarm(kind, last):
    name, values = HEALTHY[kind]
    assert alarms(name, [*values, last]) == [len(values)]


@pytest.mark.parametrize("last", [50.0, math.nan, math.inf])
def test_the_first_iterations_may_not_explode_either(last):
    assert alarms("distill/velocity_mse", [0.3, 0.4, last]) == [2]
    assert alarms("anchor/loss", [0.3, 0.4, last]) == [2]
    assert alarms("distill/velocity_mse", [last])[:1] == ([0] if not math.isfinite(last) else [])


@pytest.mark.parametrize("options", [{"growth": 1.0}, {"warm_up": 0}, {"log_ratio": -1.0}, {"limits": {"a": math.nan}}])
def test_limits_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=r"expected a(t least| )"):
        Guard(**options)


JUDGED = {
    ("drift/edge_density_change", -0.7): r"outside \[-0.6, 3\]",
    ("rollout_drift/diversity_change", -0.9): r"outside \[-0.6, 3\]",
    ("drift/dark_fraction_change", math.nan): "outside",
    ("policy/log_ratio", -0.2): "limit of 0.05 nats per latent dimension",
    ("policy/loss", math.inf): "not a finite number",
    ("drift/edge_density_change", -0.5): None,
    ("drift/edge_density", 0.0): None,
    ("val/red", math.nan): None,
}


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case[0])
def test_every_metric_is_judged_by_its_limit(case):
    import re

    answer = Guard()._fault(*case, iteration=20)
    assert answer is None if JUDGED[case] is None else re.search(JUDGED[case], answer)


# --------------------------------------------------------------------------------------------------------------- drift


class Logged(Callback):
    """What was logged, iteration by iteration."""

    def __init__(self) -> None:
        self.metrics = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_policy_that_does_not_change_does_not_drift(student, tmp_path):
    (policy, callbacks), logged = student(lr=0.0), Logged()
    fit(tmp_path, policy, [*callbacks, DriftMetrics(2), logged], limit_val_batches=1)
    changes = {name: value for name, value in logged.metrics[-1].items() if name.endswith("_change")}
    assert len(changes) == 5
    assert set(changes.values()) == {0.0}


def test_pictures_of_grpo_rollouts_are_measured_from_the_first_iteration(tiny_pipeline, tmp_path):
    policy = tiny.policy(GRPOTeacher, tiny_pipeline, advantage=GroupAdvantage())
    logged, guard = Logged(), DriftMetrics(2)
    trainer = tiny.trainer(tmp_path, [RewardCallback("red", tiny.Brightness()), guard, logged], 2)
    trainer.fit(policy, tiny.data())
    assert logged.metrics[0]["rollout_drift/sharpness"] == pytest.approx(guard.start["rollout_drift"]["sharpness"])
    assert logged.metrics[0]["rollout_drift/sharpness_change"] == 0
    assert logged.metrics[1]["rollout_drift/sharpness_change"] != 0
    assert policy.watchers == []
    assert DriftMetrics().start == {}


def test_the_start_is_remembered_over_a_resume(student, tmp_path):
    policy, callbacks = student()
    first = DriftMetrics(2)
    fit(tmp_path, policy, [*callbacks, first, Guard()], epochs=1)
    policy, callbacks = student()
    second, guard = DriftMetrics(2), Guard()
    trainer = tiny.trainer(tmp_path, [*callbacks, second, guard, saver(tmp_path)], 2, enable_checkpointing=True)
    trainer.fit(policy, tiny.data(group_size=1), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert second.start == first.start
    assert set(guard.start) == {"distill/velocity_mse"}
