"""What is shipped works where it arrives: wheel and sdist, image, the checks of the forge, the report of a bug."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from flowopd import __version__
from flowopd.cli.about import about

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def build(source: Path, kind: str, out: Path) -> Path:
    """A wheel or an sdist of a folder."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


# --------------------------------------------------------------------------------------------- wheel and sdist


def fresh_environment(folder: Path) -> dict[str, str]:
    """An environment of its own that sees the packages of this one, but no checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files in there are not followed
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{folder / 'bin'}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_runs_a_recipe_from_an_empty_folder(tmp_path):
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as packed:
        packed.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    wheel = build(source, "wheel", tmp_path / "wheel")
    environment, empty = fresh_environment(tmp_path / "venv"), tmp_path / "empty"
    empty.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", "--quiet", str(wheel))
    assert run(python, "-c", "import flowopd; print(flowopd.__file__)").startswith(str(tmp_path / "venv"))
    assert str(tmp_path / "venv") in run("flowopd", "--version", "--verbose")
    assert "tiles/opd " in run("flowopd", "recipes")
    small = ["--trainer.max_epochs=2", "--data.init_args.evaluation_count=4", "--trainer.accelerator=cpu"]
    assert "run folder: runs/tiles/opd" in run("flowopd", "fit", "--config", "tiles/opd", *small)
    assert (empty / "runs/tiles/opd/adapter/adapter_model.safetensors").is_file()
    run("flowopd", "draw", 'text red "KAHO"', "--adapter", "runs/tiles/opd")
    assert (empty / "runs/draw/sheet.png").is_file()


# --------------------------------------------------------------------------------------------- image


def test_what_the_image_copies_is_enough_to_build_the_wheel(tmp_path):
    for step, words in STEPS:
        if step == "COPY":
            *sources, target = words.split()
            for source in sources:
                place = tmp_path / "src" / target / (source if (ROOT / source).is_file() else "")
                copy = shutil.copy if (ROOT / source).is_file() else shutil.copytree
                place.parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / source, place, **({} if copy is shutil.copy else {"dirs_exist_ok": True}))
    assert build(tmp_path / "src", "wheel", tmp_path / "out").name.startswith(f"flowopd-{__version__}")


def test_the_context_of_the_image_holds_what_it_copies():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for step, words in STEPS if step == "COPY" for source in words.split()[:-1]}
    assert copied == kept


def test_the_image_has_a_python_and_extras_that_the_package_knows():
    given = dict(words.split("=", 1) for step, words in STEPS if step == "ARG")
    assert f"Programming Language :: Python :: {given['PYTHON']}" in PROJECT["classifiers"]
    assert {*given["EXTRAS"].split(",")} <= {*PROJECT["optional-dependencies"]}
    floors = {
        name: word
        for word in PROJECT["dependencies"]
        for name in ("torch", "torchvision")
        if word.startswith(f"{name}>")
    }
    assert {word for word in shlex.split(DOCKERFILE.partition("RUN pip")[2].splitlines()[0]) if ">=" in word} == set(
        floors.values()
    )
    assert ["ENTRYPOINT", '["flowopd"]'] in STEPS
    assert "flowopd" in PROJECT["scripts"]


@pytest.mark.parametrize("text", [DOCKERFILE, INSTALL], ids=["Dockerfile", "install.md"])
def test_commands_that_build_and_run_the_image_name_what_it_has(text):
    builds = re.findall(r"docker build (.*)", text)
    runs = re.findall(r"docker run (.*)", text)
    assert builds
    assert runs
    known = {words.partition("=")[0] for step, words in STEPS if step == "ARG"}
    for argument in re.findall(r"--build-arg (\w+)=", " ".join(builds)):
        assert argument in known
    tags = {re.search(r"-t (\S+)", line)[1] for line in builds}
    for line in runs:
        (image,) = [word for word in shlex.split(line.partition("#")[0]) if word in tags]
        assert f" {image} " in line


# --------------------------------------------------------------------------------------------- forge


def test_the_forge_runs_the_same_check_on_the_oldest_and_the_newest_python():
    job = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())["jobs"]["check"]
    known = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == [known[0], known[-1]]
    assert PROJECT["requires-python"] == f">={known[0]}"
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step["run"] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert '"${PYTHON:-python3}"' in (ROOT / ".ci/run").read_text()
    assert step["env"]["PYTHON"] == "python"


def test_the_form_for_a_bug_asks_for_what_we_print():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    labels = [field["attributes"]["label"] for field in form["body"]]
    assert "flowopd --version --verbose" in labels


def test_about_says_versions_devices_caches_and_git_and_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = about()
    names = [line.split()[0] for line in said.splitlines()]
    assert {"python", "flowopd", "torch", "diffusers", "peft", "system", "cpu", "cuda", "hub", "recipes", "git"} <= {
        *names
    }
    assert "hf_secret" not in said
