"""What comes with the package is found by name, copied, and begun with; what lies beside a config is imported."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tiny

from flowopd.cli.main import TOLD, VERBS
from flowopd.cli.recipes import home, recipe, recipes
from flowopd.tiles import asset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.endswith("_reward") and "." not in name:
            del sys.modules[name]


@pytest.fixture
def refused(flowopd, capsys):
    def answer(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            flowopd(*words)
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("flowopd: error: ")

    return answer


# -------------------------------------------------------------------------------------------------------- by name


def test_every_recipe_is_listed_on_a_line_of_its_own_with_what_it_does(flowopd, capsys):
    flowopd("recipes")
    lines = capsys.readouterr().out.splitlines()
    for one in recipes():
        (line,) = [line for line in lines if line.startswith(f"  {one.name} ")]
        assert one.told in line
        assert one.takes in line
        assert len(one.told.split()) >= 3


def test_the_readme_and_a_recipe_say_the_same_minutes():
    readme = (home() / "README.md").read_text(encoding="utf-8")
    for one in (one for one in recipes("tiles/") if one.kind == "recipe"):
        row = re.search(rf"^\| `{one.name}` \|.*$", readme, re.MULTILINE)
        said = re.findall(r"(\d+) min", one.takes)
        assert row is None or {*said} <= {*re.findall(r"\d+", row[0])}, one.name


def test_a_name_runs_the_recipe_and_a_file_of_that_name_wins(built):
    assert built("fit", "--config", "tiles/opd").trainer.max_epochs == 400
    assert built("fit", "--config=configs/tiles/opd.yaml").trainer.max_epochs == 400  # as the README writes it
    own = Path("tiles/opd")
    own.parent.mkdir()
    own.write_text(recipe("tiles/opd").text.replace("max_epochs: 400", "max_epochs: 7"))
    assert built("fit", "--config", "tiles/opd").trainer.max_epochs == 7
    assert built("fit", "-c", "tiles/opd", "-c", "tiles/ablations/steps_1").trainer.max_epochs == 250


def test_a_name_that_is_none_is_one_sentence(refused):
    assert refused("fit", "--config", "tiles/odp") == (
        "there is no recipe 'tiles/odp' (did you mean 'tiles/opd'?); flowopd recipes lists them"
    )
    assert "did you mean 'tiles/opd'" in refused("init", "tiles/odp", "mine")
    assert "no recipe's name begins with 'tile_'" in refused("recipes", "tile_")


def test_a_study_names_recipes(flowopd, monkeypatch):
    from flowopd.cli.study.file import read_study

    stages = read_study(home() / "tiles" / "ablations.yaml").stages
    assert {Path(config) for stage in stages for config in stage.configs} <= {one.path for one in recipes("tiles/")}


# -------------------------------------------------------------------------------------------------------- copies


def test_a_copy_is_the_recipe_in_a_run_folder_of_its_own(flowopd, built, refused, capsys):
    flowopd("init", "tiles/opd", "my_run")
    assert "flowopd fit --config my_run/opd.yaml" in capsys.readouterr().out
    text = Path("my_run/opd.yaml").read_text()
    assert "--config my_run/opd.yaml" in text
    shipped = recipe("tiles/opd").text.replace("configs/tiles/opd.yaml", "my_run/opd.yaml")
    assert text == shipped.replace("default_root_dir: runs/tiles/opd", "default_root_dir: runs/my_run")
    assert built("fit", "--config", "my_run/opd.yaml").trainer.default_root_dir == "runs/my_run"
    assert refused("init", "tiles/opd", "my_run") == "'my_run/opd.yaml' is there already; give another folder"


def test_a_task_that_could_have_no_module_is_refused(refused):
    assert refused("init", "--task", "My-Task").startswith("task is 'My-Task'; expected a name of small letters")
    assert refused("init", "--task", "text") == "the built-in world has a task 'text' already; give another name"
    assert refused("init").startswith("init needs a recipe to copy")


@pytest.mark.parametrize("where", [(), ("tasks/warm",)], ids=["here", "in a folder of folders"])
def test_what_a_new_task_begins_with_builds(flowopd, built, where):
    flowopd("init", "--task", "warm", *where)
    folder = Path(where[0] if where else "warm")
    teacher = built("fit", "--config", str(folder / "teacher.yaml"))
    assert list(teacher.datamodule.mixture.sources) == ["warm"]
    tiny.expert(Path("runs/warm/teacher/adapter"), str(asset("base")), std=0.05)
    student = built("fit", "--config", str(folder / "opd.yaml"))
    assert list(student.datamodule.mixture.sources) == ["warm", "text"]


# -------------------------------------------------------------------------------------------------------- beside


def environment() -> dict[str, str]:
    """As it is for whoever types the command: nothing of the working folder on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


SCRIPT = "import sys; sys.path[:] = [p for p in sys.path if p]; from flowopd.cli.main import main; main()"


def command(*words: str) -> None:
    """Run ``flowopd`` as its script does: the working folder is not on the path."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_module_beside_the_config_is_imported_and_a_run_goes_on_with_its_own(flowopd):
    flowopd("init", "--task", "warm", "elsewhere")
    few = ["--data.init_args.prompts_per_iteration=2", "--data.init_args.group_size=2", "--data.init_args.batch_size=4"]
    few += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    command("fit", "--config", "elsewhere/teacher.yaml", *few)
    kept = Path("runs/warm/teacher/warm_reward.py")
    assert kept.read_text() == Path("elsewhere/warm_reward.py").read_text()
    Path("elsewhere/warm_reward.py").unlink()
    run = Path("runs/warm/teacher")
    command(
        "fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt", "--trainer.max_epochs=2"
    )
    assert len((run / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_task_of_one_s_own_runs_as_it_is_in_two_minutes(flowopd):
    flowopd("init", "--task", "warm")
    before = os.times().children_user
    for name in ("teacher", "opd"):
        command("fit", "--config", f"warm/{name}.yaml", "--trainer.accelerator=cpu")
    assert os.times().children_user - before < 120
    rows = [line.split(",") for line in Path("runs/warm/opd/results.csv").read_text().splitlines()]
    scores = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[1:]}
    assert scores["student"]["warm"] > scores["base"]["warm"] + 0.1
    assert scores["student"]["text"] > scores["base"]["text"] + 0.1


# -------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_speaks_of_the_verb(verb, flowopd, capsys):
    with suppress(SystemExit):
        flowopd(verb, "--help")
    said = capsys.readouterr().out
    assert re.match(rf"usage: flowopd {verb}\b", said)
    assert verb not in TOLD or TOLD[verb].splitlines()[0] in said[:800]
    assert verb in ("fit", "validate", "test", "predict") or "--trainer.num_nodes" not in said


@pytest.mark.parametrize("verb", ["fit", "test", "plan", "check"])
def test_a_verb_without_a_recipe_says_what_to_give(verb, refused):
    assert refused(verb).endswith("give --config FILE, or a recipe by its name: flowopd recipes lists them")
