"""The laws of NFT: a signed regression around an old policy, which follows the student and is kept with it."""

from functools import partial

import pytest
import tiny
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path

from flowopd.core import (
    ODE,
    Anchored,
    CleanPicture,
    ClippedSurrogate,
    GroupAdvantage,
    Labels,
    NegativeAware,
    Transition,
    Uniform,
    UniformLevels,
)
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import Adapter, take_adapter
from flowopd.preflight import check as checks
from flowopd.preflight.forwards import DECODED, SAMPLED, TRAINED, count_forwards
from flowopd.records import StepBatch
from flowopd.teachers import BaseTeacher
from flowopd.training import (
    EMA,
    AdapterExport,
    AnchorCallback,
    GRPOTeacher,
    Inertia,
    NFTTeacher,
    RewardCallback,
    TeacherCallback,
)

RED = partial(RewardCallback, "red", tiny.Brightness())
ADAM = partial(torch.optim.AdamW, lr=1e-2)
ROWS = 4
every_beta = pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])


# ----------------------------------------------------------------------------------------------------------- objective


def noised(v: Tensor, advantage: list[float]) -> tuple[Transition, Labels]:
    """Four rows of six numbers at which the student says ``v``, with random old velocities and targets."""
    old, target = torch.randn(2, ROWS, 6, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.9, 0.7, 0.4, 0.2], dtype=torch.float64)
    student = ODE().step(torch.zeros_like(old), old + v, sigma, 0 * sigma)
    return student, Labels(target=target, old=old, advantage=torch.tensor(advantage, dtype=torch.float64))


@pytest.fixture
def at_old():
    """How far the student is from the old policy: nowhere."""
    return torch.zeros(ROWS, 6, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def away():
    """Somewhere."""
    return torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True)


def gradient(objective, student: Transition, labels: Labels, v: Tensor) -> Tensor:
    return torch.autograd.grad(objective.loss(student, labels)[0], v)[0]


def test_goodness_is_a_share():
    """r in [0, 1], 1/2 for an average picture, linear between."""
    goodness = NegativeAware(advantage_max=2.0).goodness(torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0]))
    assert goodness.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@every_beta
def test_at_the_old_policy_the_loss_knows_no_reward(at_old, beta):
    student, labels = noised(at_old, [-3.0, 0.0, 1.0, 9.0])
    error = student.sigma[:, None] * (labels.old - labels.target)
    expected = 5 / beta * (error.square().mean(1) / error.abs().mean(1)).mean()
    torch.testing.assert_close(NegativeAware(beta).loss(student, labels)[0], expected)


@every_beta
def test_at_the_old_policy_the_gradient_is_the_advantage_times_the_error(at_old, beta):
    """2·A·σ·e / (D·mean |e|), e = σ·(v_old - target): whatever β and A_max, as long as A_max is not reached."""
    student, labels = noised(at_old, [-3.0, 0.0, 1.0, 4.0])
    sigma, advantage = student.sigma[:, None], labels.advantage[:, None]
    error = sigma * (labels.old - labels.target)
    expected = 2 * advantage * sigma * error / (6 * error.abs().mean(1, keepdim=True)) / ROWS
    for largest in (5.0, 50.0):
        torch.testing.assert_close(gradient(NegativeAware(beta, largest), student, labels, at_old), expected)


@pytest.mark.parametrize("weighting", [CleanPicture(), Uniform()], ids=["clean", "uniform"])
@every_beta
def test_without_divisors_it_is_a_signed_regression_and_a_pull_to_the_old_policy(away, beta, weighting):
    """L = w · (2·A·mean (v_old - target)·Δ + β·A_max·mean Δ² + A_max/β·mean (v_old - target)²), Δ = v_θ - v_old."""
    student, labels = noised(away, [-3.0, 0.0, 1.0, 4.0])
    error, change = labels.old - labels.target, student.velocity - labels.old
    rows = 2 * labels.advantage * (error * change).mean(1) + beta * 5 * change.square().mean(1)
    rows = weighting.weight(student) * (rows + 5 / beta * error.square().mean(1))
    loss, _ = NegativeAware(beta, weighting=weighting, normalise=False).loss(student, labels)
    torch.testing.assert_close(loss, rows.mean())


@every_beta
def test_the_best_answer_moves_by_the_goodness_towards_the_picture(at_old, beta):
    """Without divisors v_θ = v_old - (2r - 1)/β · (v_old - target): a wholly good picture is learnt, at β = 1."""
    _, labels = noised(at_old, [-3.0, 0.0, 1.0, 9.0])
    objective = NegativeAware(beta, normalise=False)
    signed = 2 * objective.goodness(labels.advantage)[:, None] - 1
    best = (labels.old - signed / beta * (labels.old - labels.target)).requires_grad_()
    student = ODE().step(0 * best, best, torch.full((ROWS,), 0.5), torch.zeros(ROWS))
    assert gradient(objective, student, labels, best).abs().max() < 1e-12
    if beta == 1:
        torch.testing.assert_close(best[3], labels.target[3])


@every_beta
def test_equal_siblings_teach_nothing(at_old, beta):
    equal = GroupAdvantage("batch")(torch.full((ROWS,), 0.3), ROWS)
    student, labels = noised(at_old, equal.tolist())
    assert not gradient(NegativeAware(beta), student, labels, at_old).any()


def test_levels_are_inside_and_follow_their_density():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sigma = UniformLevels(0.4, 0.9).levels(normal)
    assert 0.4 <= sigma.min() < 0.41 < 0.89 < sigma.max() <= 0.9
    assert sigma.mean() == pytest.approx(0.65, abs=3e-3)


# ------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def nft(tiny_pipeline):
    def make(**options) -> NFTTeacher:
        torch.manual_seed(0)  # of the student's first factors
        return tiny.policy(NFTTeacher, tiny_pipeline, **({"inertia": Inertia(0.3, 0.5)} | options))

    return make


class Watch(Callback):
    """Both adapters when an iteration begins to sample and when it ends, and every batch."""

    def __init__(self):
        self.began, self.ended, self.batches = list[tuple[Adapter, Adapter]](), list[tuple[Adapter, Adapter]](), []

    def on_train_batch_start(self, trainer, pl_module, batch: StepBatch, batch_idx):
        if batch_idx == 0:
            self.began.append(adapters(pl_module))
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended.append(adapters(pl_module))


def adapters(policy: NFTTeacher) -> tuple[Adapter, Adapter]:
    student, old = (take_adapter(policy.backbone.network, name) for name in policy.adapters)
    return student, old


def same(first: Adapter, second: Adapter) -> bool:
    return all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_the_old_policy_follows_the_student(nft, tmp_path):
    """θ_old ← η·θ_old + (1 - η)·θ, η = 0, 0.3, 0.5, 0.5; within an iteration it stays."""
    watch = Watch()
    tiny.trainer(tmp_path, [RED(), watch], max_epochs=4).fit(nft(lr=1.0), tiny.data())
    assert same(*watch.began[0])
    assert not same(*watch.ended[0])
    for i, kept in enumerate((0.3, 0.5, 0.5), start=1):
        student, old = watch.ended[i - 1]
        assert same(old, watch.began[i - 1][1])
        for key, value in watch.began[i][1].tensors.items():
            expected = kept * old.tensors[key] + (1 - kept) * student.tensors[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)


def test_batches_are_noised_pictures_with_what_the_old_policy_says_there(nft, tmp_path):
    """x = (1 - σ)·clean + σ·noise, target = noise - clean; and no log-probability."""
    policy, watch = nft(lr=0.0, draws=3, levels=UniformLevels(0.2, 0.9)), Watch()
    tiny.trainer(tmp_path, [RED(), watch]).fit(policy, tiny.data())
    assert len(watch.batches) == 2 * 3  # the first draw of every rollout comes first
    cleans = [batch.x - batch.sigma[:, None, None, None] * batch.labels.target for batch in watch.batches]
    for batch in watch.batches:
        assert set(batch.labels.present()) == {"target", "old", "advantage"}
        assert 0.2 < batch.sigma.min() < batch.sigma.max() < 0.9
        torch.testing.assert_close(batch.labels.old, policy.old_velocity(batch.x, batch.sigma, batch.cond).detach())
        torch.testing.assert_close(batch.labels.advantage.reshape(2, 2).sum(1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(cleans[0], cleans[2])
    torch.testing.assert_close(cleans[1], cleans[5])
    assert not any(torch.equal(batch.x, watch.batches[0].x) for batch in watch.batches[1:])


def test_nft_raises_its_reward(nft, tmp_path):
    means = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            means.append(float(trainer.callback_metrics["reward/red"]))

    options = {"optimizer": ADAM, "objective": NegativeAware(advantage_max=2.0), "inertia": Inertia(0.0)}
    data = tiny.data(group_size=8, batch_size=32)
    tiny.trainer(tmp_path, [RED(), Keep()], max_epochs=12).fit(nft(**options), data)
    assert means[-1] > means[0] + 0.005


def test_a_pull_to_the_base_begins_at_nothing(nft, tmp_path):
    policy = nft(objective=Anchored(NegativeAware(), 0.1, CleanPicture()))
    trainer = tiny.trainer(tmp_path, [RED(), AnchorCallback(BaseTeacher())], max_epochs=2, accumulate_grad_batches=4)
    pulls = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pulls.append(float(trainer.callback_metrics["anchor/loss"]))

    trainer.callbacks.append(Keep())
    trainer.fit(policy, tiny.data())
    assert pulls[0] == 0 < pulls[1]


def test_the_exported_adapter_is_the_students(nft, tmp_path):
    policy = nft(lr=1.0)
    tiny.trainer(tmp_path, [RED(), AdapterExport()]).fit(policy, tiny.data())
    student, old = adapters(policy)
    exported = read_adapter(str(tmp_path / "adapter"))
    assert exported.fingerprint() == student.fingerprint() != old.fingerprint()


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def fit(nft, tmp_path):
    """Fit with an average; return the policy and its last checkpoint."""

    def run(max_epochs: int, ckpt_path=None):
        saving = ModelCheckpoint(
            tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1, enable_version_counter=False
        )
        options = {"enable_checkpointing": True, "accumulate_grad_batches": 2}
        trainer = tiny.trainer(tmp_path, [RED(), EMA(0.9), saving], max_epochs, **options)
        policy = nft(optimizer=ADAM)
        trainer.fit(policy, tiny.data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return policy, torch.load(tmp_path / f"epoch={max_epochs - 1}.ckpt", weights_only=True)

    return run


def test_resuming_changes_no_bit_of_student_old_policy_and_average(fit, tmp_path):
    _, straight = fit(4)
    fit(2)
    _, resumed = fit(4, tmp_path / "epoch=1.ckpt")
    parts = ("state_dict", "optimizer_states", "callbacks", "RolloutDataModule", "global_step")
    one, two = (dict(tree_leaves_with_path({part: c[part] for part in parts})) for c in (straight, resumed))
    assert one.keys() == two.keys()
    assert all(
        torch.equal(leaf, two[path]) if isinstance(leaf, Tensor) else leaf == two[path] for path, leaf in one.items()
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # scoring saves nothing
def test_a_checkpoint_holds_both_adapters_and_the_students_average(fit, nft, tmp_path):
    """Whoever evaluates it sees the average in place of the student, and the old policy as it was."""
    _, content = fit(2)
    names = {name: [key for key in content["state_dict"] if f".{name}." in key] for name in ("student", "old")}
    assert len(names["student"]) == len(names["old"]) == len(content["state_dict"]) / 2
    policy = nft()
    options = {"limit_val_batches": 1.0}
    tiny.trainer(tmp_path, [RED(), EMA(0.9)], **options).validate(
        policy, tiny.data(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True, verbose=False
    )
    found = policy.state_dict()
    average = content["callbacks"]["EMA"]["shadow_params"]
    assert all(torch.equal(found[key], value) for key, value in zip(names["student"], average, strict=True))
    assert all(torch.equal(found[key], content["state_dict"][key]) for key in names["old"])


# ----------------------------------------------------------------------------------------------- before anything is run


def test_a_plan_counts_what_the_old_policy_does(tiny_pipeline):
    """Eight rows: four steps each and its answers at two levels, one training forward per level, in two updates."""
    policy = tiny.policy(NFTTeacher, tiny_pipeline, draws=2)
    found = count_forwards(policy, tiny.data(), [RED()], accumulate=2)
    assert found == {SAMPLED: (8 * 4 + 8 * 2) / 2, TRAINED: 8 * 2 / 2, DECODED: 8 / 2}


def test_check_finds_nothing_wrong(tiny_pipeline, tmp_path):
    policy, trainer = tiny.policy(NFTTeacher, tiny_pipeline), tiny.trainer(tmp_path, [RED()])
    verdicts = {verdict.name: verdict.state for verdict in checks.check(policy, tiny.data(), trainer)}
    assert set(verdicts.values()) == {"ok", "skipped"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Inertia(rate=-1.0), "rate is -1.0; expected at least 0.0"),
        (lambda: Inertia(cap=2.0), "cap is 2.0; expected a number from 0.0 to 1.0"),
        (lambda: NegativeAware(beta=0.0), "beta is 0.0; expected a number above 0.0"),
        (lambda: UniformLevels(0.5, 0.5), r"low is 0.5, high 0.5; expected low < high"),
    ],
)
def test_numbers_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("options", "data", "callbacks", "sentence"),
    [
        ({}, {}, (), "no reward with a weight for task 'red'"),
        ({}, {"group_size": 1}, (RED,), "advantages compare siblings, but group_size is 1"),
        ({}, {"fused": True}, (RED,), r"fused rollouts cannot provide \['advantage', 'old'\]"),
        ({"objective": ClippedSurrogate()}, {}, (RED,), r"reads \['log_prob_old', 'x_next'\], but noised pictures"),
    ],
)
def test_what_cannot_be_trained_is_refused(nft, tmp_path, options, data, callbacks, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.trainer(tmp_path, [callback() for callback in callbacks]).fit(nft(**options), tiny.data(**data))


def test_an_old_policy_is_nfts_alone(tiny_pipeline, tmp_path):
    policy = tiny.policy(GRPOTeacher, tiny_pipeline, objective=NegativeAware())
    callbacks = [RED(), TeacherCallback(["red"], BaseTeacher())]
    with pytest.raises(ValueError, match="compares with an old policy, which only an NFTTeacher has"):
        tiny.trainer(tmp_path, callbacks).fit(policy, tiny.data())
