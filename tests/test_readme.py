"""What the README, the documentation and the READMEs of the folders show is true: commands, files, snippets."""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flowopd import tiles
from flowopd.cli.init import task_files
from flowopd.cli.main import HELP, LIGHTNING, RUNS, VERBS, main
from flowopd.cli.recipes import located, recipes

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "docs", ROOT / "configs", ROOT / "src")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(page for folder in FOLDERS for page in folder.rglob("*.md")))
    if path.parent.name != "task"  # TASK and FOLDER stand there for what is asked
}
BEFORE_AND_AFTER = "docs/pictures/before_after.png"


def blocks(language: str, page: str = "README.md") -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def everywhere(language: str) -> list:
    return [pytest.param(one, id=f"{page}-{k}") for page in PAGES for k, one in enumerate(blocks(language, page))]


BEGUN = re.compile(
    r"(?:.*&& |srun (?:-\S+ \d+ )*|torchrun .*|docker run .*)?(?:python )?(?:-m )?flowopd(?::\w+)? +(?=\S)"
)


def commands(page: str) -> list[str]:
    """What follows ``flowopd`` in the shell blocks of a page, a line each."""
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    told = [re.sub(r"\s#\s.*", "", line).strip() for line in lines if not line.startswith("#")]
    return [re.sub(r"\s+", " ", line[found.end() :]) for line in told if (found := BEGUN.match(line))]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def verb_of(command: str) -> str:
    """The verb of a command, and the prompt set that ``data`` writes, whose options are its own."""
    words = command.split()
    return " ".join(words[: 2 if words[0] == "data" else 1])


TASK = ("test_init.py", "test_a_task_of_one_s_own_runs_as_it_is_in_two_minutes")
RAN_BY = {
    r"--version --verbose": ("test_shipping.py", "test_about_says_versions_devices_caches_and_git_and_no_token"),
    r"fit .*(multinode|--trainer.num_nodes).*": "needs several machines; test_ranks.py has two ranks",
    r"recipes .*": ("test_init.py", "test_every_recipe_is_listed_on_a_line_of_its_own_with_what_it_does"),
    r"init --task mine": TASK,
    r"init \S+ \w+": ("test_init.py", "test_a_copy_is_the_recipe_in_a_run_folder_of_its_own"),
    r"(fit|check) --config mine/.*": TASK,
    r"fit --config \S+/config.yaml --ckpt_path .*": ("test_cli.py", "test_a_run_that_goes_on_changes_no_bit"),
    r"fit --config \S*tiles/opd\S* --config \S*tiles/ablations/.*": (
        "test_cli.py",
        "test_every_overlay_of_the_main_job_builds",
    ),
    r"fit --config \S*tiles/[\w.]+": ("test_cli.py", "test_a_run_leaves_everything_in_its_folder"),
    r"check --config \S*tiles/.*": ("test_check.py", "test_check_prints_a_verdict_per_line_and_trains_nothing"),
    r"plan --config .*": ("test_check.py", "test_plan_needs_none_of_the_devices_and_writes_nothing"),
    r"test --config \S*tiles/evaluate.*": ("test_cli.py", "test_a_finished_student_is_tested"),
    r"test --config \S*tiles/benchmark.*": ("test_cli.py", "test_every_config_builds"),
    r"validate --config .*": "as test, without its table",
    r"predict --config .*": ("test_cli.py", "test_predict_draws_held_out_prompts_to_files"),
    r"(fit|check) --config \S*sd35/.*": ("test_sd35_configs.py", "test_every_recipe_runs_two_steps"),
    r"test --config \S*sd35/.*": "needs the weights; the configs of tables are built by a test",
    r"fit --config \S*(zimage|qwen_image|flux1|flux2_klein)/.*": "needs the weights; tests have tiny ones",
    r"draw .*": ("test_draw.py", "test_prompts_are_drawn_by_the_base_and_adapters_side_by_side"),
    r"report .*": ("test_run_reports.py", "test_several_runs_stand_side_by_side"),
    r"consolidate .*": ("test_consolidate.py", "test_many_loras_become_one_that_diffusers_draws_with"),
    r"push .*": ("test_push.py", "test_a_dry_run_writes_all_that_would_be_pushed_and_asks_nobody_offline"),
    r"data (geneval|ocr) .*": ("test_prompt_sets.py", "test_generated_sets_are_written_with_their_metadata"),
    r"data .*": ("test_prompt_sets.py", "test_a_published_set_comes_from_the_web_or_the_disk"),
    r"convert .*": "needs the published checkpoint of 400 MB; test_rewards_geneval.py converts a small one",
    r"study .*": ("test_study.py", "test_a_study_of_real_runs_goes_on_where_one_was_cut_off"),
    r"serve .*": ("test_rewards_remote.py", "test_a_remote_reward_scores_as_the_reward_itself"),
}
"""The test that runs a command of this form, smaller perhaps; or why none does."""


@pytest.mark.parametrize(
    ("page", "path"),
    sorted(
        {
            (page, path)
            for page, text in PAGES.items()
            for path in re.findall(r"(?<![\w/])(?:configs|notebooks|tests|examples|src)/[\w/]+\.\w+", text)
        }
    ),
)
def test_a_file_that_is_named_exists(page, path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_a_link_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[page]):
        made = {"recipes": ROOT / "configs", "rewards": ROOT / "src/flowopd/rewards", "inside": ROOT / "src/flowopd"}
        ours = (ROOT / page).parent / target
        assert ours.is_file() or (
            page.startswith("docs/")
            and ours.resolve().relative_to(ROOT / "docs").parts[0] in (*made, "pictures", "security.md")
        ), target  # those are pages only in the site, whose build checks them


def before_and_after() -> Image.Image:
    """The first and the last row of the sheet of all models: the base and the student."""
    sheet = Image.open(ROOT / "src/flowopd/tiles/assets/models.png").convert("RGB")
    inked = (np.asarray(sheet) < 255).any((1, 2))
    edges = np.flatnonzero(np.diff(inked.astype(int), prepend=0, append=0)).reshape(-1, 2)
    rows = [(top, end) for top, end in edges if end - top > 100]
    heading, last = (
        sheet.crop((0, 0, sheet.width, rows[0][1] + 10)),
        sheet.crop((0, rows[-1][0], sheet.width, rows[-1][1] + 10)),
    )
    both = Image.new("RGB", (sheet.width, heading.height + last.height), "white")
    both.paste(heading, (0, 0))
    both.paste(last, (0, heading.height))
    return both


def test_before_and_after_are_the_first_and_the_last_model_of_the_sheet():
    shown = Image.open(ROOT / BEFORE_AND_AFTER).convert("RGB")
    assert shown.tobytes() == before_and_after().tobytes(), "make it anew by python tests/test_readme.py"


def test_objectives_of_the_table_are_ours():
    from flowopd import core

    table = re.search(r"\| objective \|.*?\n\n", PAGES["docs/concepts.md"], re.DOTALL)[0]
    words = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)))
    assert len(words) > 8
    assert [word for word in words if not hasattr(core, word)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_verb_is_one_of_ours(command):
    verb = command.split()[0]
    assert verb == "--version" or verb in VERBS
    assert verb == "--version" or re.search(rf"^  {verb} ", HELP, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_recipes_files_and_runs_that_there_are(command):
    words = shlex.split(command)
    mine = {path.as_posix() for path in task_files("mine", Path("mine"))}
    for flag, word in pairwise(words):
        if flag == "--config" and not re.match(r"RUN/|runs/|mine/|run\.yaml|RECIPE", word):
            assert Path(located(word) if not word.startswith("configs/") else ROOT / word).is_file()
        assert not word.startswith("mine/") or word in mine
    if words[0] == "init" and "--task" not in words:
        assert Path(located(words[1])).is_file()
    for word in words[1:]:
        if word.startswith("runs/"):
            assert word.startswith(tuple(folders_of_runs())), word


def folders_of_runs() -> set[str]:
    """Where recipes write, and where commands that are shown are told to."""
    told = {found[1] for one in recipes() if (found := re.search(r"default_root_dir: (\S+)", one.text))}
    return told | {"runs/both", "runs/one", "runs/mine/teacher", "runs/mine/opd", "runs/draw", "runs/tiles/untrained"}


@pytest.mark.parametrize("verb", sorted({verb_of(command) for command in COMMANDS} - {*LIGHTNING, *RUNS, "--version"}))
def test_options_that_are_shown_are_those_of_the_verb(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flowopd", *verb.split(), "--help"])
    with pytest.raises(SystemExit):
        main()
    known = capsys.readouterr().out
    shown = {word for one in COMMANDS if verb_of(one) == verb for word in re.findall(r"(?<=\s)--\w+", one)}
    assert {word for word in shown if word not in known} == set()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.split()[0] in (*LIGHTNING, *RUNS)])
def test_options_of_a_run_are_those_of_lightning(command):
    for option in re.findall(r"(?<=\s)--([\w.]+)", command):
        assert option in ("config", "ckpt_path", "push_to") or option.startswith(("trainer.", "model.", "data."))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_by_a_test_or_says_why_not(command):
    proofs = [proof for form, proof in RAN_BY.items() if re.fullmatch(form, command)]
    assert proofs
    for proof in proofs:
        if isinstance(proof, tuple):
            assert f"def {proof[1]}(" in (ROOT / "tests" / proof[0]).read_text(encoding="utf-8")


def test_ci_installs_and_tests_as_the_second_command_does():
    second = blocks("bash")[1]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r'pip install.* -e "\.\[test\]"', script)
    assert 'pip install -e ".[test]"' in second
    assert "pytest -n 2" in second
    assert "pytest -n 2" in script


def test_a_result_draws_in_stock_diffusers_as_shown():
    (snippet,) = [block for block in blocks("python", "docs/results.md") if "tiles.BASE" in block]
    shown = "runs/tiles/opd/adapter"
    assert shown in snippet
    names: dict[str, object] = {}
    exec(compile(snippet.replace(shown, str(tiles.asset("student"))), "results.md", "exec"), names)
    assert names["pipe"].transformer.config.sample_size


@pytest.mark.parametrize("snippet", everywhere("python"))
def test_a_snippet_is_python(snippet):
    compile(snippet, "page.md", "exec")


@pytest.mark.parametrize("snippet", everywhere("yaml"))
def test_a_snippet_is_yaml(snippet):
    assert yaml.safe_load(snippet)


if __name__ == "__main__":
    before_and_after().save(ROOT / BEFORE_AND_AFTER, optimize=True)
