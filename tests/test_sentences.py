"""What the parser says is said in our words; each of its phrases is met by a real slip."""

import re
import sys
from pathlib import Path

import grammar
import pytest
import torch
import yaml

from flowopd.cli import run as command_line
from flowopd.cli import sentences
from flowopd.cli.main import main
from flowopd.cli.sentences import EXPECTED, LONGEST, PHRASES, sentence_of

MODEL = ("model", "init_args")
DATA = ("data", "init_args")
SAMPLER = (*MODEL, "sampler", "init_args")
TEACHER = ("trainer", "callbacks", 5, "init_args", "teacher")
CLASS, ARGS = "class_path", "init_args"
NEAR = {CLASS: "flowopd.EMA", "init_arg": {"decay": 0.3}}
PARSED = {CLASS: "flowopd.PromptFile", ARGS: {"path": "x.txt", "task": "text", "parse": "nowhere.parse"}}

# What is written where in a recipe, or which words are added; the parser's phrase; and our answer.
SLIPS = {
    "type": ((*DATA, "batch_size"), "two", "data.batch_size is two; expected a whole number"),
    "types": (("trainer", "gradient_clip_val"), "two", "trainer.gradient_clip_val is two; expected a number"),
    "nothing": ((*DATA, "batch_size"), "", "data.batch_size is empty; expected a whole number"),
    "choice": (
        (*MODEL, "backbone", ARGS, "dtype"),
        "int8",
        r"model.backbone.dtype is int8; expected one of 'float32', ",
    ),
    "class": ((*SAMPLER, "dynamics"), 7, "model.sampler.dynamics is 7; expected a Dynamics by its class_path"),
    "protocol": (
        (*SAMPLER, "schedule"),
        [7],
        r"model.sampler.schedule is \[7\]; expected a Schedule by its class_path",
    ),
    "restricted type": (("checkpoint_every",), 0, "checkpoint_every is 0; expected a whole number of at least 1"),
    "import path": (TEACHER, "seven", "trainer.callbacks.teacher is seven; expected a class_path"),
    "file": (
        ["--trainer.callbacks", "[7]"],
        None,
        r"trainer.callbacks is \[7\]; expected a Callback by its class_path",
    ),
    "option of a class": (
        (*SAMPLER, "num_stepz"),
        3,
        r"flowopd.Sampler has no option 'num_stepz' .*'num_steps'.*takes: num",
    ),
    "option of the command": (
        ["--modle", "x"],
        None,
        r"there is no option 'modle' \(did you mean 'model'\?\); see flow",
    ),
    "missing": (TEACHER, {CLASS: "flowopd.LoRATeacher"}, "trainer.callbacks.teacher: flowopd.LoRATeacher needs path"),
    "no model": (("model",), None, "nothing says what model the run has; give --config FILE"),
    "name in a module": ((*TEACHER, CLASS), "flowopd.LoRATeachr", r"flowopd has no 'LoRATeachr' .*'LoRATeacher'"),
    "module": ((*TEACHER, CLASS), "flowpd.LoRATeacher", r"there is no module 'flowpd' \(did you mean 'flowopd'\?\)"),
    "class_path of another type": ((*TEACHER, CLASS), [7], "teacher: its class_path is not the name of a class"),
    "class_path true": ((*SAMPLER, "dynamics", CLASS), True, "dynamics: its class_path is not the name of a class"),
    "init_args of another type": ((*TEACHER, ARGS), 7, "teacher: its init_args are no table of options"),
    "foreign class": ((*TEACHER, CLASS), "flowopd.EMA", "trainer.callbacks.teacher: flowopd.EMA is not a Teacher"),
    "foreign callable": ((*MODEL, "optimizer", CLASS), "flowopd.Prompt", "flowopd.Prompt is not an Optimizer"),
    "abstract class": (
        (*TEACHER,),
        {CLASS: "flowopd.Teacher", ARGS: {}},
        "flowopd.Teacher is a protocol; name a class",
    ),
    "no class": (
        (*MODEL, "optimizer", CLASS),
        "flowopd.core.guided",
        "model.optimizer: flowopd.core.guided is no class",
    ),
    "config of another type": (["--config", "list.yaml"], None, "the config holds - 1; expected a table of options"),
    "interpolation": ((*DATA, "batch_size"), "${", r"an interpolation \$\{…\} in the config cannot be read: "),
    "restricted null": (
        ["--updates_per_iteration", "two"],
        None,
        "updates_per_iteration is two; expected a whole number",
    ),
    "near init_args": (("trainer", "callbacks", 8), NEAR, r"there is no 'init_arg' \(did you mean 'init_args'\?\)"),
    "not so near": (
        ("trainer", "callbacks", 0, ARGS, "in_averge"),
        3,
        r"no option 'in_averge' \(did you mean 'in_average'",
    ),
    "callable": ((*DATA, "prompts", "text"), PARSED, "data.prompts.parse: there is no module 'nowhere'"),
    "key of another type": ((*DATA, "ratio"), {None: 1}, "a key of the config is empty; expected a name"),
}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """The sentence that answers a slip, and the phrases of the parser that it was made of."""

    def answer(where: tuple | list, value: object) -> tuple[str, list[str]]:
        phrases: list[str] = []
        for name in ("_kind", "_explained"):
            monkeypatch.setattr(sentences, name, spied(getattr(sentences, name), phrases))
        tree = grammar.changed(grammar.recipe(), where, value) if isinstance(where, tuple) else grammar.recipe()
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        more = where if isinstance(where, list) else []
        monkeypatch.setattr(sys, "argv", ["flowopd", "fit", "--config", "recipe.yaml", *more])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err.removeprefix("flowopd: error: ").rstrip("\n"), phrases

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda *_: None)
    Path("list.yaml").write_text("- 1")
    return answer


def spied(function, phrases):
    def call(told):
        phrases.append(getattr(told, "phrase", told))
        return function(told)

    return call


@pytest.mark.parametrize("slip", SLIPS)
def test_a_phrase_of_the_parser_is_said_in_our_words(slip, said):
    where, value, expected = SLIPS[slip]
    sentence, phrases = said(where, value)
    assert re.search(expected, sentence)
    assert "\n" not in sentence
    if pattern := dict(EXPECTED).get(slip, PHRASES.get(slip)):
        assert any(re.search(pattern[0], phrase) for phrase in phrases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_in_our_words(said):
    sentence, _ = said(["--trainer.accelerator", "gpu"], None)
    assert sentence.startswith("trainer.accelerator is gpu, but no GPU is found here; ")


def test_every_phrase_is_met():
    assert {*EXPECTED, *PHRASES} - {"no gpu"} <= SLIPS.keys()


def test_no_sentence_is_without_end_or_for_machines():
    assert len(sentence_of(ValueError("word " * 10_000))) == LONGEST
    assert sentence_of(ValueError(f"{Thing()} of <class 'a.b.Thing'> is no thing")) == "Thing of Thing is no thing"
    assert sentence_of(KeyError("no such thing")) == "no such thing"
    assert sentence_of(ValueError("one\n  two")) == "one two"


class Thing:
    """Something that prints its address."""
