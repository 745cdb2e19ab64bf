"""The laws of drawing: one noise for everybody, each at its own guidance, what an adapter says beside itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from flowopd.cli.models import of_adapter, of_model
from flowopd.evaluation.drawing import Hand, draw
from flowopd.models import SD3Backbone
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.models.adapters.files import read_adapter
from flowopd.rollouts import Sampler
from flowopd.tiles import asset

STUDENT, TEACHER = str(asset("student")), str(asset("teacher_text"))
KAHO = 'text red "KAHO"'


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def facts(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "pictures.jsonl").read_text().splitlines()]


def test_prompts_are_drawn_by_the_base_and_adapters_side_by_side(flowopd, capsys):
    flowopd("draw", KAHO, "one red circle and two blue square", "--adapter", STUDENT, TEACHER, "--steps", "3")
    told = capsys.readouterr().out
    assert "drawn in 3 steps: base at guidance 1, student at guidance 1, teacher_text at guidance 1" in told
    drawn = facts("runs/draw")
    assert [line["model"] for line in drawn] == ["base"] * 2 + ["student"] * 2 + ["teacher_text"] * 2
    pictures = [pixels(f"runs/draw/{line['file']}") for line in drawn]
    assert {picture.shape for picture in pictures} == {(32, 32, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 6
    assert min(pixels("runs/draw/sheet.png").shape[:2]) > 3 * 32
    flowopd("draw", KAHO, "--steps", "3")  # the base of the built-in world, and nothing is written over
    alone, beside = (pixels(f"runs/{run}/00_base.png") for run in ("draw-2", "draw"))
    assert np.abs(alone - beside).max() <= 1  # of 255: batches of other sizes round otherwise


def test_a_picture_is_that_of_its_row_whoever_draws_beside_it(tiny_pipeline):
    backbone = tiny.backbone(tiny_pipeline)
    backbone.load()
    sampler = Sampler(num_steps=2).on(backbone)
    texts = ["a", "b", "c", "d", "e"]
    alone = draw(backbone, sampler, texts, {"base": Hand(None, 1.0)}, seed=3)["base"]
    guided = draw(backbone, sampler, texts, {"more": Hand(None, 3.0), "base": Hand(None, 1.0)}, seed=3)
    assert torch.equal(alone, guided["base"])
    assert not torch.equal(alone, guided["more"])
    assert not torch.equal(alone, draw(backbone, sampler, texts, {"base": Hand(None, 1.0)}, seed=4)["base"])


def test_an_adapter_is_drawn_at_the_guidance_of_its_card(flowopd):
    card = ModelCard(str(asset("base")), "OPDStudent", guidance_scale=2.5)
    export_adapter(read_adapter(STUDENT), Path("mine"), card)
    assert of_adapter("mine").guidance() == 2.5
    flowopd("draw", KAHO, "--adapter", "mine", "--steps", "2", "--out", "own")
    assert [line["guidance"] for line in facts("own")] == [1.0, 2.5]
    flowopd("draw", KAHO, "--adapter", "mine", "--steps", "2", "--guidance", "0", "--out", "none")
    assert [line["guidance"] for line in facts("none")] == [0.0, 0.0]


def test_a_run_is_named_and_drawn_by_its_folder(tmp_path):
    run = tmp_path / "runs" / "guided"
    export_adapter(read_adapter(STUDENT), run / "adapter", ModelCard("org/model", "OPDStudent", guidance_scale=3.0))
    text = (asset("student") / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("eval_steps: 10", "eval_steps: 7\n        guidance_scale: 3.0"))
    for path in (run, run / "adapter"):
        found = of_adapter(str(path))
        assert (found.name, found.guidance()) == ("guided", 3.0)
        backbone, sampler = found.drawing().built()
        assert (sampler.eval_steps, backbone.path) == (7, str(asset("base")))


def test_a_model_draws_as_its_family_and_a_known_one_as_its_recipe(tiny_pipeline):
    backbone, sampler = of_model(tiny_pipeline).built(size=64)
    assert isinstance(backbone, SD3Backbone)
    assert (backbone.resolution, sampler.eval_steps) == (64, 28)
    for model, steps in (("stabilityai/stable-diffusion-3.5-medium", 40), (str(asset("base")), 10)):
        backbone, sampler = of_model(model).built()
        assert (backbone.path, sampler.eval_steps) == (model, steps)


REFUSED = {
    "two bases": (["--base", "x/y", "--config", "tiles/opd"], "draw takes --base or --config, not both"),
    "a name twice": (["--adapter", STUDENT, STUDENT], "more than one adapter 'student'; expected one"),
    "no recipe of a policy": (["--config", "tiles/ablations"], "names no backbone of a model"),
    "no adapter": (["--adapter", "./nowhere"], "adapter folder './nowhere' does not exist"),
    "no model": (["--base", "./nowhere"], "model folder './nowhere' does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_one_sentence_and_leaves_no_folder(flowopd, capsys, case):
    words, said = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        flowopd("draw", KAHO, *words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()
