"""The laws of the benchmark of speed: its reference learns what our roads learn, and every job is told."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks import speed
from benchmarks.memory import Live, measured
from benchmarks.reference import MAR, Reference

from flowopd.core import Anchored, Released, TransitionKL
from flowopd.models import AdapterSource
from flowopd.models.adapters.lora import adapter_parameters
from flowopd.preflight.forwards import connect
from flowopd.rollouts import Sampler
from flowopd.teachers import LoRATeacher
from flowopd.training import AnchorCallback, OPDStudent, TeacherCallback

GUIDANCE, STEPS = 4.5, 4


@pytest.mark.parametrize("fused", [False, True])
def test_the_reference_learns_what_our_roads_learn(tiny_pipeline, tmp_path, fused):
    start, anchor, *paths = (tiny.expert(tmp_path / str(i), tiny_pipeline, i, rank=32, alpha=64) for i in range(4))
    tasks = ["red", "green"]
    ours = tiny.policy(
        OPDStudent,
        tiny_pipeline,
        Anchored(TransitionKL(Released()), strength=MAR, weighting=Released()),
        sampler=Sampler(num_steps=STEPS, guidance_scale=GUIDANCE),
        start=start,
    )
    teachers = [
        TeacherCallback([task], LoRATeacher(path, guidance_scale=GUIDANCE))
        for task, path in zip(tasks, paths, strict=True)
    ]
    data = tiny.data(*tasks, prompts_per_iteration=4, group_size=1, fused=fused)
    connect(ours, data, [*teachers, AnchorCallback(LoRATeacher(anchor, guidance_scale=GUIDANCE))])
    ours.log_dict = lambda *_, **__: None
    ours.configure_model()
    (draw,) = data.draws()
    for batch in data.road.batches([draw]):
        (ours.training_step(batch, 0) / (STEPS - 1)).backward()

    theirs = Reference(
        Path(tiny_pipeline),
        dict(zip(tasks, paths, strict=True)),
        anchor,
        GUIDANCE,
        ours.sampler.sigmas(),
        text_length=8,
    )
    read = AdapterSource(start).adapter()
    learnt = dict(theirs.student.named_parameters())
    for module, factors in read.parts.items():
        learnt[f"base_model.model.{module}.lora_A.default.weight"].data.copy_(factors.a)
        learnt[f"base_model.model.{module}.lora_B.default.weight"].data.copy_(factors.b)
    noise = torch.stack([draw.noise.start(), *(draw.noise.step(j) for j in range(STEPS - 1))])
    theirs.gradient(draw.texts, draw.tasks, noise)

    found = [parameter.grad for parameter in adapter_parameters(ours.backbone.network, "student")]
    expected = [parameter.grad for parameter in theirs.parameters]
    size = max(float(grad.abs().max()) for grad in expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4 * size, rtol=0)


@pytest.mark.slow
def test_every_job_is_told_with_its_seconds_and_its_bytes(tmp_path, capsys):
    speed.main(["--images=2", "--rounds=1", f"--folder={tmp_path}"])
    found = json.loads((tmp_path / "speed_tiny-sd3.json").read_text())
    assert list(found["jobs"]) == list(speed.JOBS)
    assert found["machine"]["processor"]
    assert all(job["clock"] > 0 and job["gb_most"] >= job["gb_between"] > 0 for job in found["jobs"].values())
    assert "of the first" in capsys.readouterr().out


@pytest.mark.parametrize("model", speed.MODELS)
def test_every_model_is_written_and_asked(tmp_path, model, capsys):
    found = speed.main([f"--model={model}", "--jobs", "labels of a step", "--images=2", "--rounds=1"])
    assert found["jobs"]["labels of a step"]["clock"] > 0


def test_live_bytes_are_those_that_somebody_holds():
    with Live({}) as live:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(500)
        assert kept.view(10, 100).shape == (10, 100)
    assert live.bytes == 4000
    assert live.peak == 6000


def test_bytes_between_two_calls_are_those_that_stay():
    def make():
        weights = torch.zeros(250)
        return lambda: torch.cat([weights, weights]).sum()

    assert measured(make) == (1000, 1000 + 2000 + 4)
