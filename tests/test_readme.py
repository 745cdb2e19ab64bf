"""What the README shows is true: its commands name what exists, its snippets run."""

import re
from pathlib import Path

import pytest

from flowopd import tiles
from flowopd.cli.main import HELP, VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


SHELL = "\n".join(blocks("bash")).replace("\\\n", " ")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|notebooks|tests|src)/[\w/]+\.\w+", README))))
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^\| (`.+?`)(?: with either)? \|", README, re.MULTILINE))))
def test_a_recipe_of_a_table_is_a_config_or_an_objective(name):
    from flowopd import core

    for word in re.findall(r"`(\w+)`", name):
        found = [*(ROOT / "configs").rglob(f"{word}.yaml")]
        assert found or hasattr(core, word), word


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"^(?:srun python -m )?flowopd +(\w+)", SHELL, re.MULTILINE))))
def test_a_verb_is_one_of_ours(verb):
    assert verb in ("fit", "validate", "test", "predict", *VERBS)
    assert re.search(rf"^  {verb} ", HELP, re.MULTILINE)


def test_ci_installs_and_tests_as_the_second_command_does():
    second = blocks("bash")[1]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r'pip install.* -e "\.\[test\]"', script)
    assert 'pip install -e ".[test]"' in second
    assert "pytest -n 2" in second
    assert "pytest -n 2" in script


def test_a_result_draws_in_stock_diffusers_as_shown(monkeypatch):
    (snippet,) = [block for block in blocks("python") if "tiles.BASE" in block]
    shown = "runs/tiles/opd/adapter"
    assert shown in snippet
    names: dict[str, object] = {}
    exec(compile(snippet.replace(shown, str(tiles.asset("student"))), "README.md", "exec"), names)
    assert names["pipe"].transformer.config.sample_size


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_is_python(snippet):
    compile(snippet, "README.md", "exec")
