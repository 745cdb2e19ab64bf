"""The laws of what a run says: in eighty letters, each thing once, models by their names, touching nothing."""

import csv
import io
import re

import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console

from flowopd.evaluation.remembered import Remembered
from flowopd.evaluation.resampling import Interval
from flowopd.evaluation.tables import show
from flowopd.models import SD3Backbone
from flowopd.preflight.outline import Outline
from flowopd.rewards import Reward
from flowopd.rollouts import Sampler
from flowopd.teachers import LoRATeacher
from flowopd.training import (
    ColdStart,
    GRPOTeacher,
    OPDStudent,
    PictureFolder,
    Progress,
    ResultsTable,
    RewardCallback,
    TeacherCallback,
)
from flowopd.training.callbacks import results
from flowopd.training.callbacks.fixed_states import FixedStateKL


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("expert"), tiny_pipeline, std=0.5)


def table(folder) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {row.pop("model"): row for row in csv.DictReader(file)}


def signals(expert):
    return [TeacherCallback(["red"], LoRATeacher(expert)), RewardCallback("red", tiny.Brightness())]


# -------------------------------------------------------------------------------------------------------------- tables


def shown(table, width: int = 80) -> str:
    file = io.StringIO()
    show(table, "student", Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("intervals", [False, True])
def test_a_table_fits_eighty_letters_and_loses_nothing(intervals):
    models = ["base", *(f"teacher-of-the-task-{i}" for i in range(7)), "cold-start", "student"]
    names = ["guidance", "composition_strict", "average", *(f"fixed_kl/{model}" for model in models[1:4])]
    numbers = {model: {name: (i + j / 10) / 10 for j, name in enumerate(names)} for i, model in enumerate(models)}
    found = {m: {n: Interval(v, v, v + 1) if intervals else v for n, v in row.items()} for m, row in numbers.items()}
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    assert sorted(re.findall(r"(?<![\[\d.])\d\.\d{3}(?![\],])", text)) == sorted(
        f"{v:.3f}" for row in numbers.values() for v in row.values()
    )
    assert "composition_strict" in text


def test_the_table_of_the_main_job_is_one_block():
    models = ["base", "teacher-composition", "teacher-text", "teacher-crispness", "cold-start", "student"]
    names = ["composition", "composition_strict", "text", "text_strict", "crispness", "average"]
    names += ["fixed_kl/teacher-composition", "fixed_kl/teacher-text"]
    text = shown({model: {"guidance": "1"} | dict.fromkeys(names, 0.5) for model in models})
    assert len(re.findall("guidance", text)) == 1


# --------------------------------------------------------------------------------------------------------------- names


def test_a_model_is_called_what_it_is(tiny_pipeline, tmp_path, expert):
    reward = RewardCallback("red", tiny.Brightness())
    alone = tiny.policy(GRPOTeacher, tiny_pipeline)
    tiny.trainer(tmp_path / "alone", [reward, ResultsTable()]).test(alone, tiny.data(), verbose=False)
    assert list(table(tmp_path / "alone")) == ["base", "teacher"]
    cold = tiny.sft(tiny_pipeline)
    tiny.trainer(tmp_path / "cold", [*signals(expert), ResultsTable()]).test(cold, tiny.data(), verbose=False)
    assert list(table(tmp_path / "cold")) == ["base", "teacher-red", "cold-start"]
    taught = tiny.policy(GRPOTeacher, tiny_pipeline)
    tiny.trainer(tmp_path / "taught", signals(expert)).test(taught, tiny.data(), verbose=False)
    assert taught.name == "student"
    assert ColdStart.name == "cold-start"


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_shown_once_and_rounded(tiny_pipeline, tmp_path, expert, capsys):
    policy, data, quiet = tiny.policy(OPDStudent, tiny_pipeline), tiny.data(), {"verbose": False}
    tiny.trainer(tmp_path, [*signals(expert), Progress()], limit_val_batches=1.0).validate(policy, data, **quiet)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("red ")]
    assert re.fullmatch(r"red +\d\.\d{3}", line)
    for own in ([], [ResultsTable()]):
        policy = tiny.policy(OPDStudent, tiny_pipeline)
        tiny.trainer(tmp_path, [*signals(expert), Progress(), *own]).test(policy, data, **quiet)
        assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("red ")]) == 1


def test_predictions_are_seen_at_once(tiny_pipeline, tmp_path, expert):
    policy = tiny.policy(OPDStudent, tiny_pipeline)
    trainer = tiny.trainer(tmp_path, [*signals(expert), PictureFolder(on_sheet=2)])
    trainer.predict(policy, tiny.data("red"), return_predictions=False)
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(sheet.getcolors(1 << 24)) > 16


# ---------------------------------------------------------------------------------------------------------- beforehand


def test_an_outline_says_what_will_happen_and_touches_nothing(tiny_pipeline, tmp_path, expert, capsys):
    students = []
    for own in ([], [Outline(), Progress()]):
        torch.manual_seed(0)
        policy = tiny.policy(OPDStudent, tiny_pipeline, start=expert, lr=1.0)
        trainer = tiny.trainer(tmp_path, [*own, *signals(expert), ResultsTable()], 2, limit_val_batches=1.0)
        trainer.fit(policy, tiny.data())
        students.append(policy.student().tensors)
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())
    said = capsys.readouterr().out
    assert "trains      a student, from " in said
    assert "teachers    teacher-red (red)" in said
    assert "updates     12, 6 to an iteration of 8 pictures" in said
    assert "forwards    about 16 a picture, a backward as two" in said  # 4 rolled out, 3 · (3 + 1) trained
    assert "evaluation  3 held-out pictures at the start and after every iteration; a table" in said
    assert re.search(r"estimate    \d+ s, by one batch that was timed here", said)


# ------------------------------------------------------------------------------------------- scores of an earlier run


@pytest.fixture
def tested(tiny_pipeline, tmp_path, expert, monkeypatch):
    """Test a student, with scores that are remembered; return what was drawn for it, and the table."""
    drawn = []
    evaluate = results.evaluate
    monkeypatch.setattr(results, "evaluate", lambda *args: drawn.append(args[2]) or evaluate(*args))

    def run(guidance: float = 1.0, reward: Reward | None = None, **options):
        drawn.clear()
        sampler = Sampler(4, guidance_scale=1.0, **options)
        policy = tiny.policy(OPDStudent, tiny_pipeline, sampler=sampler)
        teacher = TeacherCallback(["red"], LoRATeacher(expert, guidance_scale=guidance))
        own = [
            RewardCallback("red", reward or tiny.Brightness()),
            FixedStateKL(2),
            ResultsTable(str(tmp_path / "kept")),
        ]
        tiny.trainer(tmp_path / "run", [teacher, *own]).test(policy, tiny.data(), verbose=False)
        return list(drawn), table(tmp_path / "run")

    return run


def test_remembered_scores_are_those_that_are_measured(tested):
    first, fresh = tested()
    second, remembered = tested()
    assert (first, second) == (["base", "teacher-red", "student"], ["student"])
    assert remembered == fresh


def test_another_model_is_measured_anew(tested, monkeypatch):
    """By all that makes one model another: path, revision, precision, bits, negative prompt, embedded guidance."""
    tested()
    monkeypatch.setattr(SD3Backbone, "identity", property(lambda self: (self.path, "nf4")))
    assert tested()[0] == ["base", "teacher-red", "student"]


@pytest.mark.parametrize("change", [{"guidance": 2.0}, {"reward": tiny.Brightness(1)}, {"eval_steps": 3}])
def test_what_changes_a_score_makes_it_be_measured_anew(tested, change):
    tested()
    anew, _ = tested(**change)
    assert "teacher-red" in anew


class Failing:
    """Gives no number."""

    def score(self, images, prompts):
        return torch.full((len(prompts),), torch.nan)


def test_scores_that_failed_are_not_remembered(tested):
    assert tested(reward=Failing())[0] == tested(reward=Failing())[0] == ["base", "teacher-red", "student"]


def test_numbers_come_back_to_the_bit_and_torn_files_do_not_matter(tmp_path):
    memory, facts = Remembered(tmp_path), {"prompts": ["a", 1], "model": "b"}
    memory.put(facts, {"text": 1 / 3})
    assert memory.get(facts) == {"text": 1 / 3}
    assert memory.get(facts | {"model": "c"}) is None
    next(tmp_path.iterdir()).write_text('{"facts"')
    assert memory.get(facts) is None
