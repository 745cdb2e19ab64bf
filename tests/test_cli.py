"""The laws of the command line: sentences for mistakes, what a run leaves behind, going on after Ctrl-C."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from flowopd.cli import run as command_line
from flowopd.cli.main import main
from flowopd.models.adapters.files import read_adapter
from flowopd.tiles import asset
from flowopd.training.ranks.strategies import FSDP2

CONFIGS = Path(__file__).parent.parent / "configs"
ADAPTERS = ("teacher_composition", "teacher_text", "teacher_crispness", "student")
PROMPTS = "{class_path: flowopd.tiles.TilesPrompts, init_args: {task: composition, split: train}}"
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "data.init_args.evaluation_count": "4",
    "model.init_args.sampler.init_args.num_steps": "3",
    "model.init_args.sampler.init_args.eval_steps": "3",
}
FIT = {
    "trainer.max_epochs": "2",
    "trainer.check_val_every_n_epoch": "1",
    "data.init_args.prompts_per_iteration": "2",
    "data.init_args.batch_size": "2",
}
FUSED = {
    "model.init_args.sampler.init_args.window": "[0,2]",
    "model.init_args.sampler.init_args.trained": "[0,2]",
}
GROUPS = {
    "data.init_args.group_size": "2",
    "data.init_args.batch_size": "4",
    "model.init_args.sampler.init_args.window": "[0,1]",
    "model.init_args.sampler.init_args.trained": "[0,1]",
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """A random adapter in place of every one that the tiles world ships."""
    folder, base = tmp_path_factory.mktemp("adapters"), str(asset("base"))
    return {name: tiny.expert(folder / name, base, seed, std=0.05) for seed, name in enumerate(ADAPTERS, 1)}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWOPD_DEBUG", raising=False)


@pytest.fixture
def config(adapters):
    """Write a copy of a config with random adapters and other changes."""

    def write(name: str = "opd", changes: dict[str, str] | None = None) -> str:
        text = (CONFIGS / "tiles" / f"{name}.yaml").read_text()
        for adapter, path in adapters.items():
            text = text.replace(f"${{tiles:{adapter}}}", path)
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        Path(f"{name}.yaml").write_text(text)
        return f"{name}.yaml"

    return write


def options(*groups: dict[str, str]) -> list[str]:
    merged = {key: value for group in groups for key, value in group.items()}
    return [word for key, value in merged.items() for word in (f"--{key}", value)]


def small(*groups: dict[str, str]) -> list[str]:
    return options(SMALL, FIT, FUSED, *groups)


@pytest.fixture
def refusal(flowopd, capsys):
    """The one sentence that answers a mistake; nothing was trained."""

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            flowopd(*words)
        errors = capsys.readouterr().err
        sentences = [line for line in errors.splitlines() if line.startswith("flowopd: error: ")]
        assert stopped.value.code == 2
        assert len(sentences) == 1
        assert errors.rstrip().endswith(sentences[0])
        assert "Traceback" not in errors
        assert not list(Path().glob("run*"))  # no folder is left
        return sentences[0].removeprefix("flowopd: error: ")

    return refused


# ------------------------------------------------------------------------------------------------------------ sentences


TEACHER = "\n        teacher"
MISTAKES = {  # what is changed in opd.yaml, and what the answer says
    "option of a class": ({"strength:": "strenght:"}, r"Anchored has no option 'strenght' .*'strength'"),
    "option of the data": ({"batch_size: 24": "batch_sice: 24"}, r"data: .* has no option 'batch_sice' .*'batch_size'"),
    "option of a callback": ({"decay: 0.99": "decya: 0.99"}, r"callbacks: flowopd.EMA has no option 'decya' .*'decay'"),
    "option of the trainer": ({"gradient_clip_val:": "gradient_clip:"}, r"no option 'trainer.gradient_clip' .*_val'"),
    "reward": ({"tiles.Crispness": "tiles.Crispnes"}, r"reward: flowopd.tiles has no 'Crispnes' .*'Crispness'"),
    "teacher": ({"flowopd.LoRATeacher": "flowopd.LoRATeachr"}, r"teacher: flowopd has no 'LoRATeachr' .*'LoRATeacher'"),
    "no teacher at all": ({"flowopd.LoRATeacher": "flowopd.EMA"}, r"flowopd.EMA is not a Teacher: it has no attach"),
    "optimizer": ({"torch.optim.AdamW": "torch.optim.AdamX"}, r"optimizer: torch.optim has no 'AdamX' .*'Adam"),
    "task without teacher": (
        {f"tasks: [text]{TEACHER}": f"tasks: [txt]{TEACHER}"},
        r"task .txt. .did you mean .text.\?., which this run",
    ),
    "task with two": ({f"tasks: [text]{TEACHER}": f"tasks: [composition]{TEACHER}"}, r"more than one .* 'composition'"),
    "rewards of one name": ({"name: text_strict": "name: text"}, r"more than one reward 'text'; expected one"),
    "asset": ({'"${tiles:base}"': '"${tiles:bass}"'}, r"^the tiles world ships no 'bass'; it ships: .*base"),
    "resolver": ({'"${tiles:base}"': '"${tails:base}"'}, r"tails"),
    "yaml": ({"trainer:\n": "trainer\n"}, r"^Problems parsing config: .* line \d+"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence(config, refusal, mistake):
    changes, expected = MISTAKES[mistake]
    assert re.search(expected, refusal("fit", "--config", config("opd", changes), *small()))


WORDS = {
    "trainer.max_epoch": ("3", r"there is no option 'trainer.max_epoch' \(did you mean 'trainer.max_epochs'\?\); see"),
    "modle": ("3", r"there is no option 'modle' \(did you mean 'model'\?\)"),
    "data.init_args.group_sice": (
        "3",
        r"data: .* has no option 'group_sice' \(did you mean 'group_size'\?\); it takes",
    ),
    "data.init_args.batch_size": ("3", "2 prompts of 1 siblings are 2 rows, which do not fill batches of 3; choose"),
    "data.init_args.evaluation_count": ("two", "^data.evaluation_count is two; expected a whole number$"),
    "data.init_args.prompts_per_iteration": ("3", "3 prompts per iteration do not divide into shares"),
    "model.init_args.sampler.init_args.window": (
        "[1,4]",
        r"window \[1, 4\) does not lie inside the 3 steps; expected 0",
    ),
    "model.init_args.start": ("./nowhere", "^adapter folder './nowhere' does not exist"),
    "model.init_args.backbone.init_args.path": ("./nowhere", "^model folder './nowhere' does not exist"),
    "model.init_args.optimizer.init_args.lr": (
        "-1",
        "^model.optimizer.lr is -1.*; expected a number from 0.0 to 1000.0$",
    ),
    "ckpt_path": ("nowhere.ckpt", "^checkpoint 'nowhere.ckpt' does not exist"),
    "checkpoint_every": ("0", "checkpoint_every"),
    "config": ("nowhere.yaml", "File does not exist: .*nowhere.yaml"),
    "trainer.strategy": ("fsdp_cpu_offload", "^strategy 'fsdp_cpu_offload' is not supported: .*; use fsdp2 to shard"),
    "trainer.devices": ("[0,3]", "^trainer.*devices"),
    "trainer.default_root_dir": ("opd.yaml/run", r"^run folder opd.yaml/run cannot be made: .*opd.yaml is a file"),
}


@pytest.mark.parametrize("option", WORDS)
def test_a_mistake_on_the_command_line_is_one_sentence(config, refusal, option):
    value, expected = WORDS[option]
    assert re.search(expected, refusal("fit", "--config", config(), *small(), f"--{option}", value))


def test_fsdp_means_ours_and_one_line_says_so(config, flowopd, capsys, monkeypatch):
    built = []
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda cli, _: built.append(cli.trainer))
    flowopd("fit", "--config", config(), *small({"trainer.strategy": "fsdp"}))
    assert isinstance(built[0].strategy, FSDP2)
    assert capsys.readouterr().out.count("strategy fsdp: runs as fsdp2") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(config, refusal):
    said = refusal("fit", "--config", config(), *small(), "--trainer.accelerator", "gpu")
    assert said.startswith("trainer.accelerator is gpu, but no GPU is found here; ")


PROMPT_FILES = {
    "missing": (None, "", r"^prompt file 'prompts.txt' does not exist"),
    "empty": ("\n \n", "", r"^prompt file 'prompts.txt' holds no prompt; expected one per line"),
    "unknown": (
        "one red circle and two blue circle\none red circle and two pink circle\n",
        ", parse: flowopd.tiles.parse",
        r"^line 2 of 'prompts.txt' is not a prompt of task 'composition': .*'pink' is not a colour .*\(red, ",
    ),
    "parser": ("a\n", ", parse: flowopd.tiles.prase", r"flowopd.tiles has no 'prase' \(did you mean 'parse'\?\)"),
}


@pytest.mark.parametrize("case", PROMPT_FILES)
def test_a_bad_prompt_file_is_one_sentence(config, refusal, case):
    content, parse, expected = PROMPT_FILES[case]
    if content is not None:
        Path("prompts.txt").write_text(content)
    source = f"{{class_path: flowopd.prompts.PromptFile, init_args: {{path: prompts.txt, task: composition{parse}}}}}"
    assert re.search(expected, refusal("fit", "--config", config("opd", {PROMPTS: source}), *small()))


def test_a_teacher_that_does_not_fit_is_one_sentence(config, refusal, adapters, tiny_pipeline):
    tiny.expert(Path("narrow"), tiny_pipeline)
    tiny.expert(Path("partial"), str(asset("base")))
    (Path("partial") / "adapter_model.safetensors").unlink()
    anchor = adapters["teacher_crispness"]
    for folder, expected in {
        "narrow": r"^teacher '\./narrow': adapter .* does not fit this network: .*lora_[AB]",
        "nowhere": r"^adapter folder '\./nowhere' does not exist",
        "partial": r"^adapter folder partial has no adapter_model.safetensors; expected a LoRA saved in peft layout",
    }.items():
        changed = config("opd", {f'path: "{anchor}"': f"path: ./{folder}"})
        assert re.search(expected, refusal("fit", "--config", changed, *small()))


def test_a_checkpoint_that_is_none_is_refused(config, refusal):
    Path("last.ckpt").write_text("not one")
    answer = refusal("fit", "--config", config(), *small({"ckpt_path": "last.ckpt"}))
    assert answer == "checkpoint 'last.ckpt' is not one of lightning; expected <run>/checkpoints/last.ckpt"


def test_an_unknown_subcommand_is_one_sentence(refusal):
    assert "there is no verb 'bogus'; expected one of fit, validate, test, predict, plan, check, data" in refusal(
        "bogus"
    )


def test_help_and_version_answer_without_torch():
    code = "import sys; from flowopd.cli.main import main; main(); assert 'torch' not in sys.modules"
    for word, expected in (("--help", "usage: flowopd"), ("--version", r"\d+\.\d+")):
        answer = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True)
        assert re.match(expected, answer.stdout)
        assert not answer.stderr


# -------------------------------------------------------------------------------------------------------------- configs


# all but the one that reads a folder to be made, and the study; those of sd35 are built in tests/test_sd35_configs.py
UNBUILT = ("pretrain", "ablations", "study")
BUILT = sorted(path for path in (CONFIGS / "tiles").glob("*.yaml") if path.stem not in UNBUILT)


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_every_config_builds(path, adapters, monkeypatch):
    monkeypatch.setattr(command_line, "asset", lambda name: adapters.get(name) or asset(name))
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda *_: None)
    subcommand = "test" if path.stem in ("evaluate", "benchmark") else "fit"
    where = {"trainer.accelerator": "cpu", "trainer.default_root_dir": "run", "trainer.precision": "32-true"}
    monkeypatch.setattr(sys, "argv", ["flowopd", subcommand, "--config", str(path), *options(where)])
    main()
    assert not Path("run/checkpoints").exists()


OVERLAYS = sorted((CONFIGS / "tiles" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_of_the_main_job_builds(overlay, adapters, monkeypatch):
    monkeypatch.setattr(command_line, "asset", lambda name: adapters.get(name) or asset(name))
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda *_: None)
    words = ["--config", str(CONFIGS / "tiles" / "opd.yaml"), "--config", str(overlay), "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["flowopd", "fit", *words, "--trainer.default_root_dir", "run"])
    main()


RUNS = {  # overrides, and the models in the table
    "opd": (FUSED, ["base", "teacher-composition", "teacher-text", "teacher-crispness", "cold-start", "student"]),
    "opd_no_mar": (FUSED, ["base", "teacher-composition", "teacher-text", "cold-start", "student"]),
    "teacher_text": (GROUPS, ["base", "teacher"]),
    "grpo_mix": (GROUPS, ["base", "teacher"]),
    "cold_start_sft": ({}, ["base", "teacher-composition", "teacher-text", "cold-start"]),
}


def table() -> list[dict[str, str]]:
    with Path("run/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


COLUMNS = ["model", "guidance", "composition", "composition_strict", "text", "text_strict", "crispness", "average"]
DISTANCES = ["fixed_kl/teacher-composition", "fixed_kl/teacher-text"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_everything_in_its_folder(config, flowopd, name):
    overrides, models = RUNS[name]
    flowopd("fit", "--config", config(name), *options(SMALL, FIT, overrides))
    left = {str(path.relative_to("run")) for path in Path("run").rglob("*")}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "results.csv", "results.md"} <= left
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= left
    assert {"images/iteration_00000.png", "images/models.png"} <= left
    assert {"history.jsonl", "report/report.html", "report/report.md"} <= left
    assert any(file.startswith("tensorboard/events") for file in left)
    assert [row["model"] for row in table()] == models
    assert list(table()[0]) == COLUMNS + DISTANCES * name.startswith("opd")
    guidance = {"teacher-composition": "1.1", "teacher-text": "1.4"} if name.startswith("opd") else {}
    assert {row["model"]: row["guidance"] for row in table()} == dict.fromkeys(models, "1") | guidance


def test_what_a_run_says_to_draw_with_draws(config, flowopd, capsys):
    flowopd("fit", "--config", config("opd"), *options(SMALL, FIT, RUNS["opd"][0]))
    (words,) = re.findall(r"^draw +flowopd (.+)$", capsys.readouterr().out, re.MULTILINE)
    flowopd(*shlex.split(words))
    assert {path.name for path in Path("runs/draw").iterdir()} >= {"sheet.png", "00_base.png", "00_run.png"}


def test_a_merge_exports_its_adapter(config, flowopd):
    flowopd("fit", "--config", config("cold_start_merge"), *options(SMALL))
    assert {part.rank for part in read_adapter("run/adapter").parts.values()} == {12}
    assert [row["model"] for row in table()] == ["base", "teacher-composition", "teacher-text", "cold-start"]


def test_a_finished_student_is_tested(config, flowopd):
    flowopd("test", "--config", config("evaluate"), *options(SMALL))
    assert [row["model"] for row in table()] == [model for model in RUNS["opd"][1] if model != "cold-start"]
    assert Path("run/images/models.png").exists()


def test_predict_draws_held_out_prompts_to_files(config, flowopd):
    flowopd("predict", "--config", config("evaluate"), *options(SMALL, {"data.init_args.evaluation_batch_size": "3"}))
    prompts = [json.loads(line) for line in Path("run/images/prompts.jsonl").read_text().splitlines()]
    assert [prompt["task"] for prompt in prompts] == ["composition"] * 4 + ["text"] * 4
    assert {prompt["file"] for prompt in prompts} == {path.name for path in Path("run/images").glob("*.png")}
    for prompt in prompts:
        with Image.open(Path("run/images") / prompt["file"]) as picture:
            assert picture.size == (32, 32)
    with Image.open("run/sheet.png") as sheet:
        assert sheet.width > 4 * 32


# ------------------------------------------------------------------------------------------------------------- going on


STILL = {"model.init_args.scheduler.init_args.T_max": "4"}  # a schedule that does not follow max_epochs
QUICK = STILL | {"trainer.limit_val_batches": "0"}


@pytest.fixture
def bare_opd(config):
    """The main job without its pictures and its table."""
    path = Path(config())
    kept = [line for line in path.read_text().splitlines() if not re.search(r"ImageGrid|ResultsTable", line)]
    path.write_text("\n".join(kept))
    return str(path)


def test_a_run_that_goes_on_changes_no_bit(bare_opd, flowopd):
    once = {"trainer.default_root_dir": "once", "trainer.max_epochs": "4"}
    flowopd("fit", "--config", bare_opd, *small(QUICK, once))
    flowopd("fit", "--config", bare_opd, *small(QUICK))
    go_on = ["fit", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    flowopd(*go_on, "--trainer.max_epochs", "4")
    exported = [read_adapter(f"{run}/adapter").tensors for run in ("once", "run")]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(value, exported[1][key]) for key, value in exported[0].items())
    assert not Path("run-2").exists()
    logs = [Path(run, "metrics.csv").read_text() for run in ("once", "run")]
    assert logs[0] == logs[1]


def test_a_teacher_that_changed_is_refused(config, flowopd, capsys):
    flowopd("fit", "--config", config(), *small(QUICK, {"trainer.max_epochs": "1"}))
    tiny.expert(Path("swapped"), str(asset("base")), seed=9)
    text = Path("run/config.yaml").read_text()
    Path("swapped.yaml").write_text(re.sub(r"path: \S*/teacher_crispness", "path: ./swapped", text))
    with pytest.raises(SystemExit):
        flowopd("fit", "--config", "swapped.yaml", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_epochs=2")
    assert "flowopd: error: AnchorCallback changed since the checkpoint: its fingerprint" in capsys.readouterr().err


def test_the_last_iteration_is_saved_with_what_was_trained(bare_opd, flowopd):
    flowopd("fit", "--config", bare_opd, *small(QUICK, {"trainer.max_epochs": "3", "checkpoint_every": "2"}))
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == content["RolloutDataModule"]["iteration"] == 3
    exported = read_adapter("run/adapter").tensors
    saved = {key.replace(".student.", "."): value for key, value in content["state_dict"].items()}
    differing = [key for key, value in exported.items() if not torch.equal(saved[f"network.{key}"], value)]
    assert differing  # the average is exported, the trained weights are kept


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_interruption_that_a_library_makes_another_error_of_still_is_one(
    config, flowopd, monkeypatch, capsys, signum, code, error
):
    def importing_late(*_, **__):
        try:
            os.kill(os.getpid(), signum)
            time.sleep(1)
        except BaseException:
            raise error("Failed to import a part") from None

    before = signal.getsignal(signum)
    monkeypatch.setattr(command_line.LightningCLI, "instantiate_trainer", importing_late)
    with pytest.raises(SystemExit) as stopped:
        flowopd("fit", "--config", config(), *small())
    assert stopped.value.code == code
    assert "Failed to import" not in capsys.readouterr().err
    assert signal.getsignal(signum) is before


def iterations_logged() -> int:
    if not Path("run/metrics.csv").exists():
        return 0
    with Path("run/metrics.csv").open(newline="") as file:
        return sum(bool(row.get("distill/loss")) for row in csv.DictReader(file))


def test_an_interrupted_run_says_how_to_go_on_and_has_saved_what_was_done(bare_opd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowopd"]
    words = small(QUICK, {"trainer.max_epochs": "10000", "checkpoint_every": "10000"})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background shell would ignore it
    run = subprocess.Popen(
        [*command, "fit", "--config", bare_opd, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not iterations_logged() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    try:
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode not in (0, None)
    assert "Traceback" not in output
    assert f"{iterations_logged()} of 10000 · stopped" in Path("run/report/report.html").read_text()
    last = Path("run/checkpoints/last.ckpt")
    go_on = re.search(rf"go on with: flowopd (fit --config run/config.yaml --ckpt_path {last})\n", output)
    done = torch.load("run/checkpoints/last.ckpt", weights_only=True)["RolloutDataModule"]["iteration"]
    assert done == iterations_logged()  # nothing that was done is lost, though no checkpoint was due
    Path("run/config.yaml").write_text(
        Path("run/config.yaml").read_text().replace("max_epochs: 10000", f"max_epochs: {done + 1}")
    )
    subprocess.run([*command, *go_on[1].split()], env=environment, check=True, capture_output=True)
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["RolloutDataModule"]["iteration"] == done + 1
    assert Path("run/adapter/adapter_model.safetensors").exists()
