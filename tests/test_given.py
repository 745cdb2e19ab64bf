"""What is given is looked at before anything is built."""

import sys
from pathlib import Path

import grammar
import pytest
import yaml

from flowopd.cli import run as command_line
from flowopd.cli.main import main

MODEL, DATA = ("model", "init_args"), ("data", "init_args")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The sentence that answers a recipe with another value somewhere."""

    def answer(where: tuple, value: object, *words: str) -> str:
        Path("recipe.yaml").write_text(yaml.safe_dump(grammar.changed(grammar.recipe(), where, value)))
        monkeypatch.setattr(sys, "argv", ["flowopd", "fit", "--config", "recipe.yaml", *words])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err.removeprefix("flowopd: error: ").rstrip("\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda *_: None)
    return answer


NULLS = {
    "trainer.accumulate_grad_batches": (("trainer", "accumulate_grad_batches"), "1"),
    "model.optimizer.lr": ((*MODEL, "optimizer", "init_args", "lr"), "0.001"),
    "model.sampler.guidance_scale": ((*MODEL, "sampler", "init_args", "guidance_scale"), "1.0"),
    "data.batch_size": ((*DATA, "batch_size"), "16"),
    "data.prompts.text.split": ((*DATA, "prompts", "text", "init_args", "split"), "'train'"),
    "trainer.callbacks.weight": (("trainer", "callbacks", 0, "init_args", "weight"), "1.0"),
}


@pytest.mark.parametrize("place", NULLS)
def test_null_is_refused_where_it_means_nothing(place, refused):
    where, default = NULLS[place]
    assert refused(where, None) == f"{place} is null, which means nothing there; leave it out for {default}"


def test_null_is_refused_inside_of_a_record_too(refused):
    lora = {"rank": 4, "alpha": None}
    assert refused((*MODEL, "lora"), lora) == "model.lora.alpha is null, which means nothing there; leave it out for 64"


NUMBERS = {
    (*MODEL, "optimizer", "init_args", "weight_decay"): (
        float("inf"),
        "model.optimizer.weight_decay is inf; expected a finite number",
    ),
    (*MODEL, "optimizer", "init_args", "lr"): (
        1e99,
        "model.optimizer.lr is 1e+99; expected a number from 0.0 to 1000.0",
    ),
    ("seed_everything",): (-1, "seed_everything is -1; expected a whole number from 0 to 4294967295"),
    ("trainer", "gradient_clip_val"): (-1.0, "trainer.gradient_clip_val is -1.0; expected at least 0.0"),
    ("trainer", "check_val_every_n_epoch"): (0, "trainer.check_val_every_n_epoch is 0; expected at least 1"),
    ("trainer", "log_every_n_steps"): (-1, "trainer.log_every_n_steps is -1; expected at least 0"),
    ("trainer", "num_nodes"): (0, "trainer.num_nodes is 0; expected at least 1"),
}


@pytest.mark.parametrize("where", NUMBERS, ids=".".join)
def test_a_number_of_the_trainer_has_a_range(where, refused):
    value, sentence = NUMBERS[where]
    assert refused(where, value) == sentence


@pytest.mark.parametrize("content", [bytes(range(256)), "caf\u00e9: 1".encode("latin-1"), "a: 1".encode("utf-16")])
def test_a_config_that_is_no_text_is_refused_by_name(content, refused):
    Path("other.yaml").write_bytes(content)
    said = refused(("seed_everything",), 0, "--config", "other.yaml")
    assert said == "config 'other.yaml' is not a text in UTF-8; save it as one"


def test_a_key_that_stands_twice_in_a_config_is_refused(refused):
    Path("other.yaml").write_text("trainer: {max_epochs: 3}\ndata: {}\ntrainer: {max_steps: 4}\n")
    said = refused(("seed_everything",), 0, "--config", "other.yaml")
    assert said == "config 'other.yaml' has 'trainer' twice in one table; keep one"


def test_an_enum_that_no_file_holds_is_told_with_its_word(refused):
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    said = refused(("trainer", "callbacks", 8), timer)
    assert said == "interval is step by default, which no file holds; give it: step"


def test_a_model_that_is_no_policy_is_refused_beside_our_data(refused):
    foreign = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    expected = "model is a BoringModel; expected a FlowPolicy, such as flowopd.OPDStudent"
    assert refused(("model",), foreign) == expected
