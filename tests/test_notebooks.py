"""The notebooks run from top to bottom, are stored without outputs, and say of the command line what is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from flowopd.rewards.remote.serve import build, parser

HOME = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in HOME.glob("*.ipynb"))


@pytest.fixture
def one_thread(monkeypatch):
    """What the kernel inherits: one thread, and the backend that draws into the notebook."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, one_thread):
    notebook = read(name)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(notebook) >= 3
    assert not [output.text for output in outputs(notebook) if "Warning" in output.get("text", "")]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_valid_and_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"


def test_the_first_notebook_says_how_long_the_main_job_is():
    main = yaml.safe_load((HOME.parent / "configs" / "tiles" / "opd.yaml").read_text())
    assert f"makes {main['trainer']['max_epochs']} updates" in (HOME / "01_quickstart.ipynb").read_text()


def test_the_yaml_of_the_second_notebook_trains(tmp_path, one_thread):
    notebook = read("02_your_task.ipynb")
    (tmp_path / "my_task.py").write_text("\n\n".join(cell.source for cell in tagged(notebook, "my_task")))
    (tmp_path / "prompts.txt").write_text(prompts_of(notebook))
    (tmp_path / "my_task.yaml").write_text(yaml_of(notebook))
    command = [sys.executable, "-m", "flowopd", "fit", "--config", "my_task.yaml", "--trainer.max_epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "left" / "adapter" / "adapter_model.safetensors").is_file()
    assert "watch/ink" in (tmp_path / "runs" / "left" / "metrics.csv").read_text()


def test_the_reward_of_the_third_notebook_is_short_and_can_be_served(tmp_path, monkeypatch):
    notebook = read("03_your_reward.ipynb")
    (cell,) = tagged(notebook, "reward")
    source = re.search(r"'''\\\n(.*?)'''", cell.source, re.DOTALL).group(1)
    assert len(source.splitlines()) <= 30
    (tmp_path / "my_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    words = re.search(r"python -m flowopd serve (.*)", text).group(1).split()
    options = parser().parse_args(words)
    assert (type(build(json.dumps(options.reward.as_dict()))).__name__, options.port) == ("Framed", 8080)


def test_the_model_of_the_fifth_notebook_is_the_template():
    (cell,) = tagged(read("05_your_model.ipynb"), "model")
    source = re.search(r"'''\\\n(.*?)'''", cell.source, re.DOTALL).group(1)
    assert source == (HOME.parent / "examples" / "your_model.py").read_text()
    assert len(source[source.index("class YourBackbone") :].splitlines()) <= 70


def read(name):
    return nbformat.read(HOME / name, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def prompts_of(notebook):
    (cell,) = tagged(notebook, "prompts")
    return re.search(r'"""\\\n(.*?)"""', cell.source, re.DOTALL).group(1)


def yaml_of(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
