"""The laws of self-checks: what is right is ok, what is wrong is named, and a check changes nothing."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowopd.cli import run as command_line
from flowopd.core import ClippedSurrogate, LinearSchedule, ShiftedSchedule, TransitionKL
from flowopd.models import SD3Backbone
from flowopd.preflight import SelfCheck
from flowopd.preflight import check as checks
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, FullTeacher, LoRATeacher
from flowopd.training import (
    AnchorCallback,
    FlowPolicy,
    GRPOTeacher,
    OPDStudent,
    RewardCallback,
    TeacherCallback,
)

CONFIGS = Path(__file__).parent.parent / "configs"


class Broken:
    """A reward that scores by no number."""

    def score(self, images, prompts):
        return torch.full((len(images),), torch.nan)


class Wrong:
    """Prompts that say they are of another task."""

    def draw(self, count, seed):
        return tiny.Words("other").draw(count, seed)


@pytest.fixture
def teacher(tiny_pipeline, tmp_path):
    return TeacherCallback(["red"], LoRATeacher(tiny.expert(tmp_path / "teacher", tiny_pipeline)))


@pytest.fixture
def found(tiny_pipeline, tmp_path, teacher):
    """Verdicts of a recipe with one thing changed, by check."""

    def run(callbacks=None, data=None, ranks=1, folder=tmp_path, kind=OPDStudent, objective=None, **options):
        objective = objective or TransitionKL()
        policy = tiny.policy(kind, tiny_pipeline, objective, **options)
        given = [teacher, RewardCallback("red", tiny.Brightness())] if callbacks is None else callbacks
        trainer = tiny.trainer(folder, given)
        verdicts = list(checks.check(policy, data or tiny.data(), trainer, ranks))
        return {verdict.name: verdict for verdict in verdicts}

    return run


def states(verdicts) -> set[str]:
    return {verdict.state for verdict in verdicts.values()}


def test_a_sound_recipe_is_ok_in_every_line(found):
    verdicts = found()
    assert list(verdicts) == list(checks.CHECKS)
    assert states(verdicts) == {"ok"}
    assert "off by 0" in verdicts["ratio is 1 at the first update"].saw
    assert "K is 0 nats" in verdicts["K = 0 for a teacher equal to the student"].saw
    assert str(verdicts["run folder"]).startswith("ok      run folder: ")


def test_a_check_encodes_two_prompts_and_not_an_iteration(found, monkeypatch):
    encoded, own = set(), SD3Backbone.encode
    monkeypatch.setattr(SD3Backbone, "encode", lambda self, texts: encoded.update(texts) or own(self, texts))
    monkeypatch.setattr(SD3Backbone, "prepare", lambda self, texts: encoded.update(texts))
    assert states(found(data=tiny.data(group_size=1, prompts_per_iteration=8, batch_size=8))) == {"ok"}
    assert encoded <= {"red 0", "red 1", ""}


def test_a_grpo_recipe_is_ok_with_its_base_as_reference(found):
    callbacks = [RewardCallback("red", tiny.Brightness())]
    verdicts = found(callbacks, kind=GRPOTeacher, objective=ClippedSurrogate())
    assert verdicts["teachers differ from the base"].state == "skipped"
    assert states(verdicts) == {"ok", "skipped"}


def test_a_teacher_that_changes_nothing_is_named(found, tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path / "weak", tiny_pipeline, std=1e-30)
    verdicts = found([TeacherCallback(["red"], LoRATeacher(folder), "weak")])
    assert verdicts["teachers differ from the base"].state == "FAIL"
    assert "weak answers exactly as the base model does" in verdicts["teachers differ from the base"].saw


def test_a_reference_that_is_the_base_is_meant_so(found, teacher):
    from flowopd.core import Anchored

    verdicts = found([teacher, AnchorCallback(BaseTeacher())], objective=Anchored(TransitionKL()))
    assert "anchor is the base" in verdicts["teachers differ from the base"].saw


def test_a_reward_without_a_number_is_named(found, teacher):
    verdicts = found([teacher, RewardCallback("broken", Broken())])
    assert verdicts["rewards answer"].saw == "reward 'broken' scored pictures of task 'red' by [nan, nan]"


def test_a_task_without_a_teacher_is_named(found):
    assert found([])["recipe fits together"].saw.startswith("no teacher for task 'red'")


def test_prompts_of_another_task_are_named(found):
    data = tiny.data()
    data.mixture.sources["red"] = Wrong()
    assert "say that they are of task 'other'" in found(data=data)["prompts answer"].saw


def test_sizes_are_checked_for_the_ranks_of_the_run(found):
    assert found(ranks=3)["recipe fits together"].saw.startswith("4 prompts per iteration do not divide over 3 ranks")


def test_weights_that_do_not_load_skip_what_needs_them(found, tmp_path):
    verdicts = found([TeacherCallback(["red"], LoRATeacher(str(tmp_path / "nowhere")))])
    assert verdicts["weights load"].state == "FAIL"
    assert "does not exist" in verdicts["weights load"].saw
    assert verdicts["ratio is 1 at the first update"] == checks.Verdict(
        "ratio is 1 at the first update", "skipped", "the weights did not load"
    )
    assert verdicts["run folder"].state == "ok"


def test_a_training_forward_unlike_the_rollouts_is_named(found, monkeypatch):
    own = OPDStudent.velocity
    noisy = lambda self, x, sigma, cond: own(self, x, sigma, cond) * (1.01 if torch.is_grad_enabled() else 1)  # noqa: E731
    monkeypatch.setattr(OPDStudent, "velocity", noisy)
    verdicts = found()
    assert verdicts["ratio is 1 at the first update"].state == "FAIL"
    assert (
        "look for dropout, a precision plugin, torch.compile or an attention kernel"
        in verdicts["ratio is 1 at the first update"].saw
    )
    assert verdicts["K = 0 for a teacher equal to the student"].state == "FAIL"


@pytest.mark.parametrize(
    ("precision", "factor", "state"),
    [("32-true", 1.004, "FAIL"), ("bf16-mixed", 1.004, "warn"), ("bf16-mixed", 1.1, "FAIL"), ("bf16-mixed", 1, "ok")],
)
def test_a_difference_of_rounding_is_a_warning_that_names_kernels(
    tiny_pipeline, tmp_path, teacher, monkeypatch, precision, factor, state
):
    own = OPDStudent.velocity
    rounded = lambda self, *at: own(self, *at) * (factor if torch.is_grad_enabled() else 1)  # noqa: E731
    monkeypatch.setattr(OPDStudent, "velocity", rounded)
    trainer = tiny.trainer(tmp_path, [teacher], precision=precision)
    policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL())
    verdicts = {verdict.name: verdict for verdict in checks.check(policy, tiny.data(), trainer)}
    for name in ("ratio is 1 at the first update", "K = 0 for a teacher equal to the student"):
        assert verdicts[name].state == state
        assert "attention" in verdicts[name].saw or state == "ok"


def test_another_attention_kernel_with_gradient_than_without_is_a_warning(
    tiny_pipeline, tmp_path, teacher, monkeypatch
):
    own = torch.nn.functional.scaled_dot_product_attention

    def split(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH if torch.is_grad_enabled() else SDPBackend.FLASH_ATTENTION):
            return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", split)
    trainer = tiny.trainer(tmp_path, [teacher], precision="bf16-mixed")
    policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL(), start=teacher.role.teacher.source)
    verdicts = {verdict.name: verdict for verdict in checks.check(policy, tiny.data(), trainer)}
    assert verdicts["ratio is 1 at the first update"].state in ("ok", "warn")
    assert verdicts["K = 0 for a teacher equal to the student"].state == "warn"


def test_a_full_device_is_no_fault_of_a_check(found, monkeypatch):
    monkeypatch.setattr(OPDStudent, "velocity", full_device)
    with pytest.raises(torch.OutOfMemoryError):
        found()


def full_device(*_, **__):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
    )


@pytest.mark.parametrize(
    ("schedule", "state"),
    [(ShiftedSchedule(3.0), "ok"), (ShiftedSchedule(1.0), "FAIL"), (LinearSchedule(), "ok")],
    ids=["the pipeline's", "another shift", "another schedule"],
)
def test_grids_are_compared_with_the_pipelines_scheduler(found, schedule, state):
    assert found(sampler=Sampler(num_steps=4, schedule=schedule))["grids agree"].state == state


def test_a_full_teacher_with_another_grid_is_named(found, tiny_pipeline, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    other = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other.save_pretrained(str(tmp_path / "other"))
    full = FullTeacher(tiny.backbone(str(tmp_path / "other")))
    verdict = found([TeacherCallback(["red"], full)])["grids agree"]
    assert verdict.state == "FAIL"
    assert "other" in verdict.saw


def test_a_folder_that_cannot_be_made_is_named(found, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert found(folder=tmp_path / "run" / "deep")["run folder"].state == "ok"
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e6})())
    assert "has 0.0 GB left; a run needs 1.0 GB" in found()["run folder"].saw


GUIDANCE = {  # the student's, the teacher's as it was given, the verdict, and what is said
    "both without": (1.0, {}, "ok", r"student 1, teacher-red 1$"),
    "folded": (1.0, {"guidance_scale": 1.4}, "ok", r"student 1, teacher-red 1.4$"),
    "alike": (4.5, {"guidance_scale": 4.5}, "ok", r"student 4.5, teacher-red 4.5$"),
    "meant so": (4.5, {"guidance_scale": 1.0}, "ok", r"student 4.5, teacher-red 1$"),
    "left out": (
        4.5,
        {},
        "warn",
        r"1; teacher-red is asked without guidance, .* give it guidance_scale: 4.5",
    ),
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_every_role_s_guidance_is_told_and_one_left_out_beside_a_guided_student_is_a_warning(
    found, tiny_pipeline, tmp_path, kind, capsys
):
    scale, given, state, said = GUIDANCE[kind]
    teacher = TeacherCallback(["red"], LoRATeacher(tiny.expert(tmp_path / "teacher", tiny_pipeline), **given))
    sampler = Sampler(num_steps=4, guidance_scale=scale)
    verdict = found([teacher], sampler=sampler)["guidance"]
    assert verdict.state == state
    assert re.search(said, verdict.saw)
    policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL(), sampler=sampler)
    tiny.trainer(tmp_path, [teacher, SelfCheck()]).fit(policy, tiny.data())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "guidance: " in line]
    assert line == ("warning: " if state == "warn" else "") + f"guidance: {verdict.saw}"


# ------------------------------------------------------------------------------------------------------------- in a fit


def test_a_fit_with_self_checks_changes_no_bit(tiny_pipeline, tmp_path, teacher):
    ends = []
    for extra in ([], [SelfCheck()]):
        torch.manual_seed(0)
        policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL())
        tiny.trainer(tmp_path, [teacher, *extra]).fit(policy, tiny.data())
        ends.append((torch.rand(3), [p.detach().clone() for p in policy.parameters() if p.requires_grad]))
    (drawn, weights), (drawn_again, weights_again) = ends
    assert torch.equal(drawn, drawn_again)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


def test_a_fit_stops_before_its_first_update_if_a_check_fails(tiny_pipeline, tmp_path, teacher, monkeypatch):
    own = OPDStudent.velocity
    noisy = lambda self, x, sigma, cond: own(self, x, sigma, cond) * (1.01 if torch.is_grad_enabled() else 1)  # noqa: E731
    monkeypatch.setattr(OPDStudent, "velocity", noisy)
    policy = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL())
    trainer = tiny.trainer(tmp_path, [teacher, SelfCheck()])
    with pytest.raises(ValueError, match=r"^self-check failed before training: ratio is 1 at the first update: "):
        trainer.fit(policy, tiny.data())
    assert trainer.global_step == 0


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def config(tiny_pipeline, tmp_path, monkeypatch):
    """A small recipe in a file."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((CONFIGS / "tiles" / "opd_no_mar.yaml").read_text())
    Path("small.yaml").write_text(yaml.safe_dump(content))
    return "small.yaml"


def test_check_prints_a_verdict_per_line_and_trains_nothing(config, flowopd, capsys):
    flowopd("check", "--config", config, "--trainer.accelerator", "cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:8].strip() in ("ok", "warn", "FAIL")]
    assert len(lines) == 1 + len(checks.CHECKS)
    assert lines[0].startswith("ok      configuration builds")
    assert not Path("runs").exists()


def test_check_ends_with_an_error_code_if_something_fails(config, flowopd, capsys):
    with pytest.raises(SystemExit) as stopped:
        flowopd("check", "--config", config, "--trainer.accelerator=cpu", "--model.init_args.start=./nowhere")
    assert stopped.value.code == 1
    assert "FAIL    weights load: adapter folder './nowhere' does not exist" in capsys.readouterr().out


def test_a_config_that_does_not_build_is_a_verdict_too(config, flowopd, capsys):
    with pytest.raises(SystemExit) as stopped:
        flowopd("check", "--config", config, "--data.init_args.batch_size", "7", "--trainer.accelerator", "cpu")
    assert stopped.value.code == 2
    assert "FAIL    configuration builds: 24 prompts of 1 siblings are 24 rows" in capsys.readouterr().err


def test_plan_needs_none_of_the_devices_and_writes_nothing(config, flowopd, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    devices = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp"]
    flowopd("plan", "--config", config, *devices, "--data.init_args.batch_size", "3")
    shown = capsys.readouterr().out
    assert "each of 8 ranks" in shown
    assert "frozen transformer" in shown
    assert not Path("runs").exists()


def test_a_plan_is_shown_before_anything_is_measured_and_outlives_a_full_device(config, flowopd, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None)
    shown = []

    def measured(*_):
        shown.append(capsys.readouterr().out)
        full_device()

    monkeypatch.setattr(command_line, "measured", measured)
    flowopd("plan", "--config", config)
    assert "peak (estimate)" in shown[0]
    assert "work of every optimiser step" in shown[0]
    assert "measured here: not even the transformer and one micro-batch fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "place", "named"),
    [
        (FlowPolicy, "training_step", "while sampling or training; lower data.batch_size, which is 24, or set model."),
        (SD3Backbone, "decode", "while held-out pictures were drawn; lower data.evaluation_batch_size, which is 64;"),
    ],
)
def test_a_full_device_is_a_sentence_that_names_the_number_to_lower(
    config, flowopd, capsys, monkeypatch, kind, place, named
):
    monkeypatch.setattr(kind, place, full_device)
    words = [f"--data.init_args.{name}" for name in ("evaluation_batch_size=64", "evaluation_count=2")]
    with pytest.raises(SystemExit) as stopped:
        flowopd("fit", "--config", config, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"flowopd: error: the device ran out of memory (tried to allocate 20.00 GiB) {named}" in said


def test_updates_per_iteration_set_the_accumulation(config, flowopd, capsys):
    words = ["--updates_per_iteration", "5", "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit):
        flowopd("check", "--config", config, *words)
    assert "2 batches per iteration and rank do not divide into 5 updates" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flowopd("check", "--config", config, "--trainer.accumulate_grad_batches", "8", "--trainer.accelerator", "cpu")
    assert "sets trainer.accumulate_grad_batches; give one of the two" in capsys.readouterr().err
