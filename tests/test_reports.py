"""The laws of what people look at: tables that agree with themselves, pictures, the exported adapter."""

import csv
from functools import partial

import pytest
import tiny
import torch
from PIL import Image

from flowopd.models.adapters.files import read_adapter
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, Beyond, LoRATeacher
from flowopd.training import (
    EMA,
    AdapterExport,
    AnchorCallback,
    DriftMetrics,
    ImageGrid,
    OPDStudent,
    Progress,
    ResultsTable,
    RewardCallback,
    TeacherCallback,
)
from flowopd.training.callbacks.results import evaluate, models


@pytest.fixture
def expert(tiny_pipeline, tmp_path):
    return tiny.expert(tmp_path / "expert", tiny_pipeline, std=0.5)


def fit(folder, policy, expert, *callbacks, **options):
    signals = [TeacherCallback(["red"], LoRATeacher(expert)), RewardCallback("red", tiny.Brightness())]
    trainer = tiny.trainer(folder, [*signals, *callbacks], **options)
    trainer.fit(policy, tiny.data())
    return trainer


def table(folder) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {row.pop("model"): row for row in csv.DictReader(file)}


def test_a_student_that_stays_at_its_teacher_scores_as_its_teacher(tiny_pipeline, tmp_path, expert):
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=expert, lr=0.0)
    fit(tmp_path, policy, expert, ResultsTable())
    rows = table(tmp_path)
    assert list(rows) == ["base", "teacher-red", "cold-start", "student"]
    assert rows["teacher-red"] == rows["cold-start"] == rows["student"] != rows["base"]
    assert rows["student"].keys() == {"guidance", "red", "average"}
    assert (tmp_path / "results.md").read_text().startswith("| model | guidance | red | average |")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_every_row_has_its_own_guidance_and_says_it(tiny_pipeline, tmp_path, expert, scale):
    """The base is drawn as the model is meant to be, whatever the student's guidance; the column is in no average."""
    policy = tiny.policy(OPDStudent, tiny_pipeline, lr=0.0, sampler=Sampler(num_steps=4, guidance_scale=scale))
    policy.backbone.guidance_scale = 3.0
    beyond = Beyond(LoRATeacher(expert, guidance_scale=1.5), BaseTeacher(), strength=1.0)
    callbacks = [AnchorCallback(BaseTeacher(3.0)), TeacherCallback(["red"], beyond), ResultsTable()]
    trainer = tiny.trainer(tmp_path, [*callbacks, RewardCallback("red", tiny.Brightness())])
    trainer.test(policy, tiny.data(), verbose=False)
    rows = table(tmp_path)
    said = {name: row.pop("guidance") for name, row in rows.items()}
    assert said == {"base": "3", "teacher-red": "1.5 and 1", "anchor": "3", "student": f"{scale:g}"}
    assert rows["base"] == rows["anchor"]
    assert all(row["red"] == row["average"] for row in rows.values())
    state = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.9]), policy.backbone.encode(["red 1", "red 2"])
    field = models(policy)["base"](*state)
    assert torch.equal(field, policy.backbone.velocity(*state, guidance_scale=3.0))
    assert not torch.allclose(field, policy.velocity(*state), atol=1e-4)


def test_the_base_of_an_unknown_model_is_drawn_as_the_policy_is(tiny_pipeline):
    policy = tiny.policy(OPDStudent, tiny_pipeline, sampler=Sampler(guidance_scale=2.0))
    assert policy.backbone.guidance_scale is None
    assert policy.base().guidance_scale == 2.0


class Scores(ResultsTable):
    """Keeps the table to all its digits."""

    def on_fit_end(self, trainer, pl_module):
        super().on_fit_end(trainer, pl_module)
        self.student = evaluate(pl_module, pl_module.velocity, "student")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_table_agrees_with_the_evaluation(tiny_pipeline, tmp_path, expert, precision):
    """To the bit, in whichever precision: one computation for both, before, in, and after the training."""
    policy, scores = tiny.policy(OPDStudent, tiny_pipeline, start=expert, lr=0.0), Scores()
    trainer = fit(tmp_path, policy, expert, scores, limit_val_batches=1.0, precision=precision)
    seen = float(trainer.callback_metrics["val/red"])
    assert scores.rows["cold-start"]["red"] == scores.student["red"] == pytest.approx(seen, abs=1e-7)
    assert table(tmp_path)["student"]["red"] == f"{seen:.3f}"


def test_the_drift_starts_at_nothing(tiny_pipeline, tmp_path, expert):
    """A policy that stays where it is has not drifted, in half precision either."""
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=expert, lr=0.0)
    drift = DriftMetrics(prompts_per_task=2)
    trainer = fit(tmp_path, policy, expert, drift, limit_val_batches=1.0, precision="bf16-mixed")
    changes = {name: float(v) for name, v in trainer.callback_metrics.items() if name.endswith("_change")}
    assert changes
    assert set(changes.values()) == {0.0}


def test_models_are_drawn_where_they_were_trained(tiny_pipeline, tmp_path, expert, monkeypatch):
    """Lightning moves a module to the CPU before the hooks at the end of a fit."""
    policy, events = tiny.policy(OPDStudent, tiny_pipeline), []
    for name in ("cpu", "to", "draw"):
        method = getattr(policy, name)
        spy = partial(lambda name, method, *args: events.append(name) or method(*args), name, method)
        monkeypatch.setattr(policy, name, spy)
    fit(tmp_path, policy, expert, ResultsTable(), ImageGrid())
    after = events[events.index("cpu") + 1 :]
    assert "draw" in after
    assert after.index("to") < after.index("draw")


def test_grids_show_the_policy_along_the_way_and_every_model_at_the_end(tiny_pipeline, tmp_path, expert):
    policy = tiny.policy(OPDStudent, tiny_pipeline)
    fit(tmp_path, policy, expert, ImageGrid(prompts_per_task=2, every=2), Progress(), max_epochs=3)
    grids = {path.stem: Image.open(path) for path in (tmp_path / "images").glob("*.png")}
    assert grids.keys() == {"iteration_00000", "iteration_00002", "models"}
    assert grids["models"].height > 2 * grids["iteration_00000"].height  # base, teacher and student
    assert all(len(grid.getcolors(1 << 24)) > 16 for grid in grids.values())


def test_the_average_is_what_is_exported(tiny_pipeline, tmp_path, expert):
    policy, ema = tiny.policy(OPDStudent, tiny_pipeline, lr=20.0), EMA(0.9)
    fit(tmp_path, policy, expert, AdapterExport(), ema, max_epochs=3)
    exported = read_adapter(str(tmp_path / "adapter"))
    average = dict(zip(policy.student().tensors, ema.state_dict()["shadow_params"], strict=True))
    for key, value in exported.tensors.items():
        assert torch.equal(value, average[key])


def test_an_anchor_has_a_row_of_its_own(tiny_pipeline, tmp_path, expert):
    policy = tiny.policy(OPDStudent, tiny_pipeline, lr=0.0)
    anchor, reward = AnchorCallback(BaseTeacher(), name="mar"), RewardCallback("red", tiny.Brightness())
    teacher = TeacherCallback(["red"], LoRATeacher(expert), name="painter")
    trainer = tiny.trainer(tmp_path, [anchor, reward, teacher, ResultsTable()])
    trainer.test(policy, tiny.data(), verbose=False)
    rows = table(tmp_path)
    assert list(rows) == ["base", "painter", "mar", "student"]
    assert rows["mar"] == rows["base"] == rows["student"] != rows["painter"]
