"""The laws of a plan: exact bytes, forwards by the recipe's own code, FLOP of the true size; nothing is downloaded."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowopd.core import Anchored, ClippedSurrogate, StateRewardSurrogate, TransitionKL
from flowopd.models import LoRASpec, Merge, SD3Backbone
from flowopd.models.adapters.lora import adapter_parameters, add_adapter
from flowopd.models.quantized import nbytes
from flowopd.preflight import costs
from flowopd.preflight.costs import flop_counter
from flowopd.preflight.forwards import DECODED, SAMPLED, TRAINED, count_evaluation, count_forwards, pictures_per_update
from flowopd.preflight.plan import Hardware, device_count, measured, optimizer_bytes, plan
from flowopd.preflight.shapes import KNOWN, Shapes, parameter_count
from flowopd.preflight.tables import seconds, show_plan, show_speed
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import (
    EMA,
    SFT,
    AnchorCallback,
    ColdStart,
    DriftMetrics,
    FixedStateKL,
    GRPOTeacher,
    OPDStudent,
    RewardCallback,
    TeacherCallback,
)

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LORA = 18_776_064  # numbers of an adapter of rank 32 on the attention projections


def medium(**options) -> SD3Backbone:
    return SD3Backbone(MEDIUM, **({"resolution": 512, "max_sequence_length": 128} | options))


def teacher(task: str, **options) -> TeacherCallback:
    return TeacherCallback([task], LoRATeacher(f"nobody/{task}", **({"guidance_scale": 4.5} | options)))


def released_sizes() -> tuple[OPDStudent, object, list]:
    """16 images, two teachers and MAR, ten steps of which nine are trained, guidance 4.5."""
    sampler = Sampler(num_steps=10, guidance_scale=4.5)
    policy = OPDStudent(medium(), Anchored(TransitionKL()), sampler=sampler)
    data = tiny.data("geneval", "ocr", prompts_per_iteration=16, group_size=1, batch_size=16)
    anchor = AnchorCallback(LoRATeacher("nobody/anchor", guidance_scale=4.5))
    return policy, data, [teacher("geneval"), teacher("ocr"), anchor]


@pytest.fixture(scope="module")
def planned():
    return plan(*released_sizes(), Hardware(accumulate=9))


# ----------------------------------------------------------------------------------------------------------- true size


def test_the_medium_model_has_its_published_size():
    shapes = Shapes(medium())
    network = shapes.transformer()
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert parameter_count(network) == 2_243_171_520
    assert shapes.latent == (16, 64, 64)
    assert shapes.text().tokens.shape == (1, 205, 4096)
    adapted = adapter_parameters(shapes.adapted(LoRASpec()), "student")
    assert len(adapted) == 2 * 191
    assert sum(p.numel() for p in adapted) == LORA


def test_the_large_model_has_its_published_size():
    assert parameter_count(Shapes(SD3Backbone("stabilityai/stable-diffusion-3.5-large")).transformer()) == 8_056_627_520


def test_the_text_encoders_of_the_medium_model_take_eleven_gigabytes():
    assert sum(Shapes(medium()).encoders().values()) == pytest.approx(11.2e9, rel=0.01)
    assert "text_encoder_3" not in Shapes(medium(max_sequence_length=0)).encoders()


def test_a_forward_of_the_medium_model_at_512_pixels_is_2_22_tflop():
    shapes = Shapes(medium())
    network = shapes.transformer()
    with torch.no_grad(), flop_counter() as counted:
        costs.run(network, shapes, *costs.one_state(shapes))
    assert counted.get_total_flops() / 1e12 == pytest.approx(2.22, abs=0.01)


def test_static_memory_stays_below_six_gigabytes(planned):
    weights_and_optimizer = {name: size for name, size in planned.resident.items() if name != "autoencoder"}
    positions = 384 * 384 * 1536 * 2
    assert weights_and_optimizer == {
        "frozen transformer": 2 * 2_243_171_520 + positions,
        "adapter of the student": 4 * LORA,
        "weights of teacher-geneval": 4 * LORA,
        "weights of teacher-ocr": 4 * LORA,
        "weights of anchor": 4 * LORA,
        "gradients": 4 * LORA,
        "optimiser": pytest.approx(8 * LORA, rel=1e-4),
    }
    assert planned.static() <= 6e9


def test_a_further_teacher_takes_at_most_80_megabytes(planned):
    assert 0 < planned.resident["weights of teacher-ocr"] <= 80e6


def test_a_run_with_checkpointing_fits_24_gigabytes(planned):
    activations = planned.for_comparison["activations, checkpointed"]
    checkpointed = planned.static() + activations + planned.training["trajectories"]
    assert max(checkpointed, planned.static() + max(planned.transient.values())) <= 24e9
    assert planned.for_comparison["activations, kept"] > 24e9


def test_forwards_are_those_of_the_released_sizes(planned):
    assert planned.forwards == {SAMPLED: 320, TRAINED: 288, "teacher-geneval": 144, "teacher-ocr": 144, "anchor": 288}
    assert planned.flop["anchor"] == planned.flop[TRAINED]
    assert planned.flop["anchor"] / 288e12 == pytest.approx(2.22, rel=0.02)  # an adapter adds a little
    assert 1 < planned.flop["backward"] / planned.flop[TRAINED] < 1.25  # the frozen weights need no gradient


def per_picture(planned, policy, data, callbacks, steps: int) -> float:
    """What a plan of these sizes says, without its shapes."""
    forwards = count_forwards(policy, data, callbacks, accumulate=steps)
    return replace(planned, forwards=forwards, pictures=pictures_per_update(policy, data, 1, steps)).per_picture()


def test_a_picture_of_the_full_road_takes_ninety_forwards_and_a_folded_one_of_two_steps_twenty(planned):
    """A backward counts as two. MAR asks one more teacher: without it the full road takes 72, and 92 if it stores."""
    policy, data, callbacks = released_sizes()
    plain = OPDStudent(policy.backbone, sampler=policy.sampler)
    assert per_picture(planned, plain, data, callbacks[:2], 9) == 92
    data.fused = True
    assert per_picture(planned, plain, data, callbacks[:2], 9) == 72
    assert per_picture(planned, policy, data, callbacks, 9) == 90
    policy.sampler = Sampler(num_steps=10, steps=SpreadSteps(2))
    assert 8 < per_picture(planned, policy, data, callbacks, 2) <= 20


# ------------------------------------------------------------------------------------------------------------ forwards


def counted(kind, tiny_pipeline, callbacks, objective=None, hardware=Hardware(), sampler=None, **data):  # noqa: B008
    policy = tiny.policy(kind, tiny_pipeline, objective, sampler=sampler or Sampler(num_steps=4))
    tasks = data.pop("tasks", ("red",))
    return count_forwards(policy, tiny.data(*tasks, **data), callbacks, hardware.ranks, hardware.accumulate)


def test_the_fused_road_calls_the_student_once_per_step(tiny_pipeline):
    callbacks = [teacher("red", guidance_scale=1.0)]
    sizes = {"prompts_per_iteration": 4, "group_size": 1, "batch_size": 4}
    whole = counted(OPDStudent, tiny_pipeline, callbacks, **sizes)
    fused = counted(OPDStudent, tiny_pipeline, callbacks, **sizes, fused=True, hardware=Hardware(accumulate=3))
    assert whole == {SAMPLED: 16 / 3, TRAINED: 4, "teacher-red": 4}
    assert fused == {TRAINED: 12, "teacher-red": 12}


def test_siblings_share_the_steps_before_their_first_noise(tiny_pipeline):
    sampler = Sampler(num_steps=4, window=(2, 3))
    sizes = {"prompts_per_iteration": 2, "group_size": 3, "batch_size": 6, "share_start": True}
    callbacks = [RewardCallback("red", tiny.Brightness())]
    found = counted(GRPOTeacher, tiny_pipeline, callbacks, ClippedSurrogate(), sampler=sampler, **sizes)
    assert found == {SAMPLED: 2 * 2 + 6 * 2, TRAINED: 6, DECODED: 6}


def test_alternating_tasks_are_averaged_over_their_turns(tiny_pipeline):
    sizes = {"tasks": ("a", "b"), "ratio": {"a": 3, "b": 1}, "alternate": True, "group_size": 1, "batch_size": 4}
    callbacks = [teacher("a", guidance_scale=1.0), teacher("b", guidance_scale=3.0)]
    found = counted(OPDStudent, tiny_pipeline, callbacks, **sizes, hardware=Hardware(accumulate=3))
    assert found["teacher-a"] == 12 * 3 / 4
    assert found["teacher-b"] == 12 * 2 / 4


def test_every_rank_takes_its_share(tiny_pipeline):
    callbacks = [teacher("red", guidance_scale=1.0)]
    one = counted(OPDStudent, tiny_pipeline, callbacks, batch_size=2, hardware=Hardware(accumulate=12))
    two = counted(OPDStudent, tiny_pipeline, callbacks, batch_size=2, hardware=Hardware(ranks=2, accumulate=6))
    assert {name: count / 2 for name, count in one.items()} == two


def test_labels_of_whole_trajectories_are_counted(tiny_pipeline):
    found = counted(OPDStudent, tiny_pipeline, [teacher("red", guidance_scale=1.0)], StateRewardSurrogate())
    assert found["teacher-red"] * 6 == 8 * 3  # two batches of four rows are six updates


def test_sft_samples_by_the_teachers(tiny_pipeline):
    policy = ColdStart(tiny.backbone(tiny_pipeline), SFT(draws=2), sampler=Sampler(num_steps=4))
    found = count_forwards(policy, tiny.data(group_size=1), [teacher("red", guidance_scale=2.0)])
    assert found == {"teacher-red": 4 * 4 * 2 / 2, TRAINED: 4}


def test_an_evaluation_counts_its_pictures_and_what_callbacks_measure(tiny_pipeline):
    policy = tiny.policy(OPDStudent, tiny_pipeline, sampler=Sampler(num_steps=4, eval_steps=5))
    callbacks = [teacher("a", guidance_scale=3.0), teacher("b", guidance_scale=1.0), DriftMetrics(2), FixedStateKL(3)]
    once = {"teacher-a, once": 3 * 5 * 2, "teacher-b, once": 3 * 5}
    unscored = count_evaluation(policy, tiny.data("a", "b", evaluation_count=10), callbacks)  # nothing is drawn then
    assert unscored == {"held-out pictures": 0, "DriftMetrics": 4 * 5, "FixedStateKL": 6 * 4} | once
    callbacks.append(RewardCallback("bright", tiny.Brightness(), weight=0))
    found = count_evaluation(policy, tiny.data("a", "b", evaluation_count=10), callbacks, ranks=2)
    assert found == {"held-out pictures": 20 * 5 / 2, "DriftMetrics": 4 * 5, "FixedStateKL": 6 * 4} | once
    assert count_evaluation(policy, tiny.data("a", evaluation_count=0), callbacks) == {}


def test_counting_leaves_the_recipe_as_it_was(tiny_pipeline):
    policy, data = tiny.policy(OPDStudent, tiny_pipeline), tiny.data()
    callbacks = [teacher("red")]
    own, reward = policy.backbone, callbacks[0].role.teacher
    count_forwards(policy, data, callbacks, ranks=2)
    assert policy.backbone is own
    assert callbacks[0].role.teacher is reward
    assert (data.prompts_per_iteration, data.iteration, "log_dict" in vars(policy)) == (4, 0, False)
    with pytest.raises(RuntimeError):
        _ = own.network  # nothing was read


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_keeps_what_autograd_keeps(tiny_pipeline, checkpointing):
    shapes = Shapes(tiny.backbone(tiny_pipeline))
    network = tiny.loaded(tiny_pipeline).network
    add_adapter(network, "student", LoRASpec(4, 8))
    if checkpointing:
        network.enable_gradient_checkpointing()
    kept = costs._Kept(network)
    with kept, flop_counter() as flop:
        costs.run(network, shapes, *costs.one_state(shapes, device="cpu"))
    traced = costs.trace(shapes, LoRASpec(4, 8), autocast=False)
    assert kept.total() == (traced.kept_checkpointed if checkpointing else traced.kept)
    assert flop.get_total_flops() == traced.forward


def test_autocast_keeps_less(tiny_pipeline):
    shapes = Shapes(tiny.backbone(tiny_pipeline, dtype="bfloat16"))
    assert costs.trace(shapes, LoRASpec(), True).kept < costs.trace(shapes, LoRASpec(), False).kept


def test_a_plan_knows_the_adapters_that_are_here(tiny_pipeline, tmp_path):
    folders = [tiny.expert(tmp_path / str(rank), tiny_pipeline, rank=rank) for rank in (2, 4)]
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=Merge(folders))
    callbacks = [TeacherCallback(["red"], LoRATeacher(folders[0])), AnchorCallback(BaseTeacher()), EMA()]
    made = plan(policy, tiny.data(), callbacks, Hardware())
    per_rank = made.resident["weights of teacher-red"] / 2
    assert made.resident["adapter of the student"] == made.resident["EMA"] == 6 * per_rank
    assert per_rank == 4 * sum(
        sum(p.shape) - 1 for p in adapter_parameters(Shapes(policy.backbone).adapted(LoRASpec(1)), "student")
    )
    assert made.notes == []
    assert "weights of anchor" not in made.resident


def test_the_optimiser_is_measured_not_guessed(tiny_pipeline):
    shapes = Shapes(tiny.backbone(tiny_pipeline))
    adapter = shapes.adapter_bytes(LoRASpec(4, 8))
    sizes = {}
    for name, kind in {"plain": partial(torch.optim.SGD, lr=1), "adam": torch.optim.AdamW}.items():
        sizes[name] = optimizer_bytes(kind, shapes.adapted(LoRASpec(4, 8)))
    assert sizes["plain"] == 0
    assert 2 * adapter <= sizes["adam"] <= 2 * adapter + 1000


def test_a_picture_of_512_pixels_takes_a_fifth_to_a_half_gigabyte_to_decode():
    one, two = (costs.decode_bytes(Shapes(medium()), rows) for rows in (1, 2))
    assert 0.2e9 < one < 0.5e9
    assert two == pytest.approx(2 * one, rel=0.05)


def test_pictures_are_decoded_a_few_at_a_time_and_counted():
    policy, data, callbacks = released_sizes()
    data.evaluation_batch_size = 8
    made = plan(policy, data, callbacks, Hardware())
    data.evaluation_batch_size = 128
    more = plan(policy, data, callbacks, Hardware())
    grown = [made.transient["pictures, and decoding them"] for made in (made, more)]
    assert grown[1] - grown[0] == 120 * 3 * 512 * 512 * 4  # the pictures themselves
    assert grown[0] < 4e9
    data.evaluation_count = 0
    assert plan(policy, data, callbacks, Hardware()).transient["pictures, and decoding them"] == 0


def test_a_plan_counts_the_velocities_that_are_kept_and_no_others(tiny_pipeline):
    sizes = []
    for objective in (TransitionKL(), StateRewardSurrogate()):
        policy = tiny.policy(OPDStudent, tiny_pipeline, objective)
        sizes.append(plan(policy, tiny.data(), [teacher("red")], Hardware()).training["trajectories"])
    assert [size / (4 * 8 * 4 * 8 * 8) for size in sizes] == [5, 13]  # four steps: states; velocities and targets


def test_a_plan_says_that_large_encoders_are_read_again_and_how_not_to():
    policy, data, callbacks = released_sizes()
    read_again = [any("read anew" in note for note in plan(policy, data, callbacks, Hardware()).notes)]
    for options in ({"text_cache": "here"}, {"keep_encoders": True}, {}):
        policy.backbone = medium(**options)
        read_again.append(any("read anew" in note for note in plan(policy, data, callbacks, Hardware()).notes))
    assert read_again == [True, False, False, True]


def test_sharding_divides_weights_over_the_ranks(tiny_pipeline):
    policy, callbacks = tiny.policy(OPDStudent, tiny_pipeline), [teacher("red")]
    whole = plan(policy, tiny.data(), callbacks, Hardware(ranks=2))
    parts = plan(policy, tiny.data(), callbacks, Hardware(ranks=2, sharded=True))
    for name in ("frozen transformer", "optimiser", "gradients"):
        assert parts.resident[name] == whole.resident[name] / 2
    assert parts.forwards == whole.forwards


def test_hardware_is_read_from_the_trainer_section():
    section = {
        "strategy": "fsdp2",
        "devices": 8,
        "num_nodes": 2,
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 3,
    }
    assert Hardware.asked(section) == Hardware(16, True, True, 3)
    assert Hardware.asked({"devices": "auto"}) == replace(Hardware(), ranks=max(torch.cuda.device_count(), 1))
    assert [device_count(devices) for devices in ("4", [0, 2], "0,1,3")] == [4, 2, 3]


def test_a_model_that_is_not_here_is_one_sentence():
    message = r"^transformer/config.json of model 'some/other' is not here, and a plan downloads nothing; give a folder"
    with pytest.raises(ValueError, match=message):
        Shapes(SD3Backbone("some/other")).transformer()


def test_a_folder_is_believed_before_what_is_known(tiny_pipeline):
    assert Shapes(tiny.backbone(tiny_pipeline)).config("transformer")["num_layers"] == 2
    assert nbytes(Shapes(tiny.backbone(tiny_pipeline)).transformer()) == nbytes(tiny.loaded(tiny_pipeline).network)
    assert KNOWN[MEDIUM]["transformer"]["num_layers"] == 24


# --------------------------------------------------------------------------------------------------- shown and measured


def test_a_plan_is_shown_with_every_part(planned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    show_plan(planned, Hardware())
    show_speed(planned, lambda: costs.Speed(0.01, 0.03))
    shown = capsys.readouterr().out
    for name in [*planned.resident, *planned.training, *planned.transient, *planned.forwards]:
        assert name in shown
    assert "nobody/anchor is not here; taken for one of rank 32" in shown
    assert f"{seconds(planned.forwards, costs.Speed(0.01, 0.03)):.1f} s" in shown


def test_hours_are_an_estimate_from_flop_and_a_stated_utilisation(planned, capsys):
    assert planned.hours("H100", 500) == pytest.approx(500 * sum(planned.flop.values()) / (0.4 * 989e12) / 3600)
    show_plan(planned, Hardware())
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("estimate, measured nowhere"))
    assert f"{planned.hours('H100', 1000):.2g} on H100, {planned.hours('A100', 1000):.2g} on A100, at 40%" in said


def test_seconds_are_those_of_the_parts():
    assert seconds({SAMPLED: 10, "teacher": 5, TRAINED: 2, DECODED: 100}, costs.Speed(2.0, 7.0)) == 15 * 2 + 2 * 7


class Ticking(TorchDispatchMode):
    """A clock that goes on by one with every operation."""

    ticks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ticks += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_measured_on_random_weights(tiny_pipeline, monkeypatch):
    with Ticking() as clock:
        monkeypatch.setattr(costs, "now", lambda device: float(clock.ticks))
        speed = measured(tiny.policy(OPDStudent, tiny_pipeline), tiny.data(), False, "cpu")
    assert 0 < 2 * speed.forward < speed.trained  # a backward takes more of them than a forward


def test_the_benchmark_runs_tiny(tmp_path, capsys):
    from benchmarks import sd35_step

    sd35_step.main(["--tiny", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    for part in sd35_step.PARTS:
        assert part in shown
    assert Path(tmp_path, "sd35_step.json").exists()


@pytest.mark.gpu
def test_a_step_of_true_size_fits_24_gigabytes(tmp_path):
    from benchmarks import sd35_step

    found = sd35_step.main(["--checkpointing", "--rows", "4", "--folder", str(tmp_path)])
    assert found["static_gb"] <= 6
    assert found["peak_gb"] <= 24
    assert found["static_gb"] == pytest.approx(found["static_gb_planned"], rel=0.1)
