"""The law of an accelerator, without one: an iteration mixes no devices, and none of its steps waits for the device."""

import pytest
import tiny
import tiny_families
import torch
from pretended import CUDA, Waited, move, pretended_cuda

from flowopd.core import (
    CPS,
    ODE,
    Anchored,
    BranchDistance,
    ClippedSurrogate,
    DanceSDE,
    FlowMatching,
    FlowSDE,
    LogRatioSurrogate,
    ODEDistance,
    Ramp,
    Released,
    ReleasedKL,
    ReturnToGo,
    SelfNormalisedDistance,
    StateRewardSurrogate,
    TransitionKL,
    Uniform,
    WeightedSum,
)
from flowopd.models import LoRASpec, QwenImageBackbone, SD3Backbone, ZImageBackbone
from flowopd.records import Prompt
from flowopd.rewards.scorer import Scorer
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, Beyond, Blend, LoRATeacher
from flowopd.teachers.composed import Piecewise
from flowopd.training import (
    SFT,
    AnchorCallback,
    ColdStart,
    FlowPolicy,
    GRPOTeacher,
    NFTTeacher,
    OPDStudent,
    TeacherCallback,
)

FAMILIES = {"sd3": SD3Backbone, "zimage": ZImageBackbone, "qwen": QwenImageBackbone}
PIPELINES = {"sd3": tiny.pipeline, "zimage": tiny_families.zimage, "qwen": tiny_families.qwen}
DYNAMICS = {"flow": FlowSDE(), "dance": DanceSDE(), "cps": CPS(), "ode": ODE()}
FUSED = {  # objectives that need velocities alone: both roads
    "default": TransitionKL(),
    "uniform": TransitionKL(Uniform()),
    "ode distance": TransitionKL(ODEDistance()),
    "released weights": TransitionKL(Released()),
    "self-normalised": SelfNormalisedDistance(),
    "branches": BranchDistance(),
    "flow matching": FlowMatching(),
    "anchored": Anchored(TransitionKL(), strength=Ramp(1.0, 0.1, 10)),
    "anchored by half": Anchored(TransitionKL(), asked=0.5),
}
WHOLE = {
    "released": ReleasedKL(),
    "log-ratio": LogRatioSurrogate(),
    "return to go": ReturnToGo(),
    "state reward": StateRewardSurrogate(),
}
TEACHERS = {
    "two": lambda folder: (LoRATeacher(folder, guidance_scale=3.0), BaseTeacher(1.0)),
    "beyond": lambda folder: (Beyond(LoRATeacher(folder), BaseTeacher()), BaseTeacher(3.0)),
    "blend": lambda folder: 2 * (Blend([LoRATeacher(folder), BaseTeacher()], [1, Piecewise([(0.2, 1), (0.9, 0)])]),),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: str(tmp_path_factory.mktemp("pipelines") / family) for family in FAMILIES}
    for family, folder in made.items():
        PIPELINES[family]().save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def expert(folders, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("expert"), folders["sd3"])


@pytest.fixture
def built(folders, tmp_path):
    """A policy and its data that know each other, on the CPU."""

    def build(kind, *args, teachers=(), anchor=None, family="sd3", fused=False, dynamics=None, scale=3.0, **options):
        options |= {"lora": LoRASpec(4, 8), "sampler": Sampler(3, dynamics=dynamics, guidance_scale=scale)}
        lengths = {"sd3": 8, "zimage": 96, "qwen": 96}
        backbone = FAMILIES[family](
            folders[family], dtype="float32", resolution=16, max_sequence_length=lengths[family]
        )
        policy: FlowPolicy = kind(backbone, *args, **options)
        callbacks = [TeacherCallback([task], one) for task, one in zip(("red", "green"), teachers, strict=False)]
        callbacks += [] if anchor is None else [AnchorCallback(anchor)]
        data = tiny.data("red", "green", prompts_per_iteration=2, batch_size=4, fused=fused)
        trainer = tiny.trainer(tmp_path, callbacks)
        trainer.strategy.connect(policy)
        policy.trainer = data.trainer = trainer
        policy.configure_model()
        policy.backbone.prepare([text for draw in data.draws() for text in draw.texts])
        return policy, data

    return build


def walk(policy, data) -> None:
    """An iteration: rollouts, labels, the student's forwards and losses; everything that is logged is there, too."""
    logged = []
    policy.log_dict = lambda metrics, **_: logged.extend(metrics.values())
    with pretended_cuda():
        move(policy.network)
        policy._device = CUDA
        losses = [policy.training_step(batch, 0) for batch in data.road.batches(data.draws())]
        assert len(losses) == data._length()
        assert {value.device for value in (*losses, *logged)} == {CUDA}


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
@pytest.mark.parametrize("objective", FUSED)
def test_objectives_of_velocities_on_both_roads(built, expert, objective, fused):
    anchor = BaseTeacher(1.0) if "anchored" in objective else None
    teachers = TEACHERS["two"](expert)
    walk(*built(OPDStudent, FUSED[objective], teachers=teachers, anchor=anchor, fused=fused))


@pytest.mark.parametrize("objective", WHOLE)
def test_objectives_of_finished_trajectories(built, expert, objective):
    walk(*built(OPDStudent, WHOLE[objective], teachers=TEACHERS["two"](expert)))


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_every_dynamics(built, expert, dynamics):
    options = {"teachers": TEACHERS["two"](expert), "dynamics": DYNAMICS[dynamics]}
    walk(*built(OPDStudent, TransitionKL(Uniform()), **options))


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(built, family, fused):
    teachers = BaseTeacher(1.0), BaseTeacher(2.0)
    walk(*built(OPDStudent, teachers=teachers, family=family, fused=fused))


@pytest.mark.parametrize("teachers", TEACHERS)
def test_every_kind_of_teacher(built, expert, teachers):
    walk(*built(OPDStudent, teachers=TEACHERS[teachers](expert), fused=True))


@pytest.mark.parametrize("kind", [GRPOTeacher, NFTTeacher])
def test_learning_from_rewards_but_for_the_rewards_themselves(built, kind, monkeypatch):
    """Scores are waited for, once in an iteration: they become numbers of a log."""
    monkeypatch.setattr("flowopd.training.grpo_teacher._equal_groups", lambda *_: 0.0)
    policy, data = built(kind)
    policy.judged = lambda rollouts, begun=(): (torch.empty(4, device=CUDA), {"reward/x": 0.5})
    walk(policy, data)


def test_rewards_and_distillation_together(built, expert, monkeypatch):
    monkeypatch.setattr("flowopd.training.grpo_teacher._equal_groups", lambda *_: 0.0)
    policy, data = built(
        GRPOTeacher, WeightedSum([ClippedSurrogate(), TransitionKL()], [1.0, 0.5]), teachers=TEACHERS["two"](expert)
    )
    policy.judged = lambda rollouts, begun=(): (torch.empty(4, device=CUDA), {"reward/x": 0.5})
    walk(policy, data)


def test_a_cold_start(built, expert):
    walk(*built(ColdStart, SFT(draws=2), teachers=TEACHERS["two"](expert)))


def test_pictures_are_decoded_and_scored_where_they_are(built):
    policy, _ = built(GRPOTeacher)
    prompts = [Prompt("a", "red"), Prompt("b", "green"), Prompt("c", "red")]
    scorer = Scorer("red", tiny.Brightness(), ["red"])
    autoencoder = policy.backbone.autoencoder
    with pretended_cuda():
        move(autoencoder)
        images = policy.backbone.decode(torch.empty(3, *policy.backbone.latent_shape(), device=CUDA))
        assert scorer.detail(images, prompts).value.device == images.device == CUDA


# ----------------------------------------------------------------------------------------------- what the law would see


def test_a_branch_on_a_number_of_the_device_raises():
    with pretended_cuda(), pytest.raises(Exception, match="local_scalar_dense"):
        bool((torch.empty(2, device=CUDA) > 0).all())


def test_two_devices_in_one_sum_raise():
    with pretended_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device=CUDA) + torch.zeros(2)


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.cpu(), lambda x: torch.zeros(2).to(CUDA), lambda x: x[[1, 0]], lambda x: x.new_tensor([1.0])],
    ids=["to the CPU", "from the CPU", "a list of rows", "a number"],
)
def test_a_copy_that_waits_raises(waits):
    with pretended_cuda(), pytest.raises(Waited):
        waits(torch.empty(2, device=CUDA))


# -------------------------------------------------------------------------------------------------------- a real device


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_no_step_waits_for_a_real_device(built, expert, fused):
    """Forward, loss and backward of every step, and what samples and labels between them; after a first iteration."""
    policy, data = built(OPDStudent, teachers=TEACHERS["two"](expert), fused=fused)
    policy.log_dict = lambda *_, **__: None
    policy.to("cuda")
    for waiting in ("default", "error"):
        draws = data.draws()
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            for batch in data.road.batches(draws):
                policy.training_step(batch, 0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
