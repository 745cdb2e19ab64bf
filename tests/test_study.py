"""The laws of a study: what is done is skipped, what was cut off goes on, the table is that of numpy."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowopd.cli import run as command_line
from flowopd.cli.main import main
from flowopd.cli.run import PlanCLI
from flowopd.cli.study import command, facts, runs
from flowopd.cli.study.file import read_study
from flowopd.cli.study.table import Row, printed, spread, trained, write_table
from flowopd.preflight.forwards import DECODED, count_forwards

CONFIGS = Path(__file__).parent.parent / "configs"
OPD = str(CONFIGS / "tiles" / "opd.yaml")
MERGE = str(CONFIGS / "tiles" / "cold_start_merge.yaml")
REAL = runs.COMMAND, facts.built

STAND_IN = '''
"""Stands in for a run: leaves a checkpoint, an adapter, a table and what it was given; may fail, hang or be killed."""
import json, os, signal, sys, time
from pathlib import Path

words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:] if word.startswith("--") and "=" in word)
folder, seed, goes_on = Path(words["trainer.default_root_dir"]), int(words["seed_everything"]), "ckpt_path" in words
(folder / "checkpoints").mkdir(parents=True, exist_ok=goes_on)
started = time.time()
if words.get("do") == "fail":
    sys.exit("flowopd: error: it was told to fail")
(folder / "checkpoints" / "last.ckpt").write_text("")
if words.get("do") == "be killed" and not goes_on:
    os.kill(os.getpid(), signal.SIGKILL)
if words.get("do") == "hang" and not goes_on:
    time.sleep(60)
time.sleep(float(words.get("wait", 0)))
used = [Path(path, "weights").read_text() for path in json.loads(os.environ["FLOWOPD_STAGES"]).values()]
(folder / "adapter").mkdir(exist_ok=True)
(folder / "adapter" / "weights").write_text(words.get("weights", f"{seed}"))
if "shown" in words:
    (folder / "config.yaml").write_text("{}")
score = float(words.get("score", 0.5)) + 0.01 * seed**2
(folder / "results.csv").write_text(f"model,text,average\\nbase,0.1,0.2\\nstudent,{score:.3f},{score + 0.1:.3f}\\n")
(folder / "said.json").write_text(json.dumps(
    {"used": used, "goes_on": goes_on, "times": [started, time.time()], "threads": os.environ.get("OMP_NUM_THREADS")}
))
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder, in which a stand-in runs in the place of every command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    Path("stand_in.py").write_text(STAND_IN)
    Path("any.yaml").write_text("{}")
    monkeypatch.setattr(runs, "COMMAND", (sys.executable, "stand_in.py"))
    monkeypatch.setattr(runs, "PAUSE", 0.02)
    monkeypatch.setattr(facts, "built", lambda stage: {"overrides": dict(stage.overrides)})


def write(stages, **options):
    Path("study.yaml").write_text(json.dumps({"folder": "out", "stages": stages} | options))


def stage(name, *, seeds=None, configs="any.yaml", **overrides):
    return {"name": name, "configs": configs, "overrides": overrides} | ({"seeds": seeds} if seeds else {})


def study(jobs=1):
    """Run the study; its exit code."""
    try:
        command.run_study(read_study(Path("study.yaml")), jobs)
    except SystemExit as end:
        return end.code
    return 0


def said(name, seed=0):
    return json.loads(Path(f"out/{name}/seed_{seed}/said.json").read_text())


def moment(name, seed=0):
    """When a run was made."""
    return said(name, seed)["times"]


def test_what_is_done_and_unchanged_is_skipped():
    write([stage("a"), stage("b", adapter="${stage:a}")], seeds=[0, 1])
    assert study() == 0
    before = {(name, seed): moment(name, seed) for name in "ab" for seed in (0, 1)}
    assert study() == 0
    assert {key: moment(*key) for key in before} == before
    assert not list(Path("out").rglob("*earlier*"))


def test_what_has_changed_is_made_anew_and_the_earlier_run_is_kept():
    Path("prompts.jsonl").write_text("a cat")
    write([stage("a", prompts="prompts.jsonl"), stage("b")])
    assert study() == 0
    first, other = moment("a"), moment("b")
    Path("prompts.jsonl").write_text("a dog")
    assert study() == 0
    second = moment("a")
    assert second != first
    write([stage("a", prompts="prompts.jsonl", score=0.7), stage("b")])
    assert study() == 0
    assert moment("a") != second
    assert moment("b") == other
    kept = [json.loads(path.read_text())["times"] for path in sorted(Path("out/a").glob("seed_0_earlier*/said.json"))]
    assert kept == [first, second]


def test_a_stage_is_made_anew_when_the_adapter_that_it_uses_has_other_bytes():
    write([stage("a"), stage("b", adapter="${stage:a}")])
    assert study() == 0
    before = moment("b")
    write([stage("a", score=0.9), stage("b", adapter="${stage:a}")])
    assert study() == 0
    assert moment("b") == before  # the new run of a has made the same adapter
    write([stage("a", weights="others"), stage("b", adapter="${stage:a}")])
    assert study() == 0
    assert moment("b") != before
    assert said("b")["used"] == ["others"]


def test_a_stage_uses_the_adapter_of_its_own_seed_or_the_only_one():
    write(
        [
            stage("merge", seeds=[7]),
            stage("a", seeds=[0, 1]),
            stage("b", seeds=[0, 1], start="${stage:a}"),
            stage("c", seeds=[0, 1], start="${stage:merge}"),
        ]
    )
    assert study(jobs=2) == 0
    assert [said("b", seed)["used"] for seed in (0, 1)] == [["0"], ["1"]]
    assert [said("c", seed)["used"] for seed in (0, 1)] == [["7"], ["7"]]


def test_a_fit_that_was_killed_goes_on_from_its_checkpoint():
    write([stage("a", do="be killed")])
    assert study() == 1
    assert study() == 0
    assert said("a")["goes_on"]
    assert not list(Path("out").rglob("*earlier*"))


def test_a_study_that_is_interrupted_stops_its_runs_and_goes_on():
    write([stage("a", do="hang")])

    def interrupt(_):
        while not Path("out/a/seed_0/checkpoints/last.ckpt").exists():
            pass
        raise KeyboardInterrupt

    conductor = runs.Conductor(plan := read_study(Path("study.yaml")), {"a": facts.built(plan.stages[0])})
    with pytest.raises(KeyboardInterrupt):
        conductor.conduct(interrupt)
    assert conductor.runs[0].process.returncode is not None
    assert study() == 0
    assert said("a")["goes_on"]


def test_a_stage_that_fails_loses_only_those_that_use_it(capsys):
    write([stage("a", do="fail"), stage("b", start="${stage:a}"), stage("c", start="${stage:b}"), stage("d")])
    assert study() == 1
    assert said("d")
    assert not Path("out/b").exists()
    told = capsys.readouterr()
    assert re.search(r"failed: a seed 0: .*it was told to fail; see out/a/seed_0.log", told.err)
    assert "failed: b seed 0: uses a seed 0, which failed" in told.err
    assert "failed: c seed 0: uses b seed 0, which failed" in told.err
    assert [row["seeds"] for row in read("out/study.csv")] == ["1", "0 of 1", "0 of 1", "0 of 1", "1"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_run_at_a_time_and_share_the_cores(jobs, monkeypatch):
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 8)
    write([stage("a", seeds=[0, 1, 2, 3], wait=0.2 if jobs == 1 else 2.0)])
    assert study(jobs) == 0
    times = [moment("a", seed) for seed in range(4)]
    together = [sum(first <= begin < last for first, last in times) for begin, _ in times]
    assert max(together) == jobs
    assert {said("a", seed)["threads"] for seed in range(4)} == {None if jobs == 1 else "4"}


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_mean_and_spread_are_those_of_numpy():
    values = [0.81, 0.82, 0.85, 0.9]
    assert spread(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    write([stage("a", score=0.3), stage("b", score=0.6, seeds=[5])], seeds=[0, 1, 2])
    assert study() == 0
    base, a, b = read("out/study.csv")
    scores = [0.3, 0.31, 0.34]
    assert (base["model"], base["seeds"], float(base["text"]), float(base["text ±"])) == ("base", "3", 0.1, 0.0)
    assert (a["model"], a["seeds"]) == ("a", "3")
    assert float(a["text"]) == pytest.approx(np.mean(scores), abs=1e-6)
    assert float(a["text ±"]) == pytest.approx(np.std(scores, ddof=1), abs=1e-6)
    assert (b["seeds"], b["text"], b["text ±"]) == ("1", "0.85", "")
    assert "| a | 3 | 0.00 | 0.317 ± 0.021 | 0.417 ± 0.021 |" in Path("out/study.md").read_text()


def test_a_study_writes_a_page_of_all_its_runs(capsys):
    write([stage("a", shown=1), stage("b", shown=1, seeds=[1])], seeds=[0, 1])
    assert study() == 0
    page = Path("out/report/report.html")
    assert f"report: {page}" in capsys.readouterr().out
    assert all(name in page.read_text() for name in ("a/seed_0", "a/seed_1", "b/seed_1"))


def test_the_trained_model_of_a_table_is_its_last():
    """Whatever it is called: a teacher's own run says teacher."""
    assert trained({"base": {}, "teacher": {}}) == "teacher"
    assert trained({}) == ""


PARENT = """
import subprocess, sys, time, os
program = [sys.executable, "-c", "import time; time.sleep(60)"]
words = [sys.executable, "-m", "flowopd.cli.study.tied", str(os.getpid()), *program]
print(subprocess.Popen(words, start_new_session=True).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells")
def test_a_study_that_is_killed_outright_leaves_no_run_behind():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = Path("/proc", parent.stdout.readline().strip())
    deadline = time.monotonic() + 60
    while b"tied" in (words := (child / "cmdline").read_bytes()) or not words:
        time.sleep(0.02)  # it has become the program
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


def is_alive(process):
    """A process that has ended may still be listed, until somebody asks for its exit code."""
    return (process / "stat").exists() and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_printed_table_fits_and_loses_nothing(tmp_path):
    names = [f"a_score_of_many_letters_{k}" for k in range(9)]
    rows = [Row("a model of a long name", 2, 1.5, [dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.6)])]
    text = printed(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in names)
    assert text.count("0.550 ± 0.071") == len(names)
    write_table(rows, tmp_path / "study")
    assert "0.550 ± 0.071" in (tmp_path / "study.md").read_text()


def test_a_dry_run_says_what_would_run_and_writes_nothing(capsys):
    write([stage("a"), stage("b", start="${stage:a}")], seeds=[0, 1])
    words = read_study(Path("study.yaml"))
    command.run_study(words, dry_run=True)
    assert capsys.readouterr().out.splitlines() == ["a  seeds 0, 1: new", "b  seeds 0, 1: after a"]
    assert not Path("out").exists()
    assert study() == 0
    write([stage("a"), stage("b", start="${stage:a}", score=1)], seeds=[0, 1])
    capsys.readouterr()
    command.run_study(read_study(Path("study.yaml")), dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "a  seeds 0, 1: done",
        "b  seeds 0, 1: anew: its configuration changed",
    ]


WRONG = {
    "no such stage": ([stage("a"), stage("b", start="${stage:aa}")], r"no such stage \(did you mean 'a'\?\)"),
    "a circle": ([stage("a", start="${stage:b}"), stage("b", start="${stage:a}")], "in a circle: a ← b ← a|b ← a ← b"),
    "itself": ([stage("a", start="${stage:a}")], "in a circle: a ← a"),
    "a later one": ([stage("a", start="${stage:b}"), stage("b")], "which comes later; put it before"),
    "other seeds": (
        [stage("a", seeds=[0, 1]), stage("b", seeds=[2], start="${stage:a}")],
        "has seeds 2, but 'a', which it uses, has 0, 1",
    ),
    "of a test": ([stage("a") | {"run": "test"}, stage("b", start="${stage:a}")], "is a test and has no adapter"),
    "no config": ([stage("a", configs=["none.yaml"])], "stage 'a': config 'none.yaml' does not exist"),
    "misspelt": ([stage("a") | {"overide": {}}], r"stages\[0\] has no option 'overide' \(did you mean 'overrides'\?\)"),
    "twice": ([stage("a"), stage("a")], "more than one stage 'a'"),
    "one folder": ([stage("a") | {"folder": "x"}, stage("b") | {"folder": "./x"}], "'a' and 'b' write into one folder"),
    "a folder within": ([stage("a") | {"folder": "x"}, stage("b") | {"folder": "x/y"}], "write into one folder"),
    "no verb": ([stage("a") | {"run": "train"}], "run is 'train'; expected one of fit, validate, test, predict"),
    "no name": ([{"configs": "any.yaml"}], r"stages\[0\] has no name"),
    "no stages": ([], "has no stages"),
    "seeds": ([stage("a") | {"seeds": [1, 1]}], "expected a list of different whole numbers"),
    "a seed set": ([stage("a", seed_everything=1)], "overrides seed_everything, which the study sets; give seeds"),
    "a checkpoint set": ([stage("a", ckpt_path="x")], "overrides ckpt_path"),
    "a stage that is none": (["a"], r"stages\[0\] is 'a'; expected a table"),
}


@pytest.mark.parametrize("slip", WRONG)
def test_bad_input_is_one_sentence_before_anything_runs(slip, monkeypatch, capsys):
    stages, sentence = WRONG[slip]
    write(stages)
    monkeypatch.setattr(sys, "argv", ["flowopd", "study", "--config", "study.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith("flowopd: error: ")
    assert told.count("\n") == 1
    assert re.search(sentence, told)
    assert not Path("out").exists()


@pytest.mark.parametrize("words", [["--config", "none.yaml"], ["--jobs", "2"], ["--config", "any.yaml", "--jobs=0"]])
def test_a_command_that_is_no_study_is_one_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flowopd", "study", *words])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(r"flowopd: error: .+\n", told)


@pytest.mark.slow
def test_the_stages_of_the_ablation_table_take_equal_forwards(monkeypatch):
    """As ``flowopd plan`` counts them: of student, teachers and anchor, in all updates of a run."""
    monkeypatch.chdir(CONFIGS.parent)
    taken = []

    class Counting(PlanCLI):
        def _run_subcommand(self, subcommand):
            counts = count_forwards(self.model, self.datamodule, self.trainer.callbacks, 1, self._accumulate(1) or 1)
            rows = sum(count for name, count in counts.items() if name != DECODED)
            taken.append(rows * self._chosen("trainer.max_epochs"))

    stages = read_study(CONFIGS / "tiles" / "ablations.yaml").stages
    for one in stages:
        monkeypatch.setattr(sys, "argv", ["flowopd", "plan", *one.words(0)[1:]])
        command_line.run(Counting)
    found = dict(zip([one.name for one in stages], taken, strict=True))
    assert found == {name: pytest.approx(found["steps_2"], rel=0.02) for name in found}  # whole updates, fifty draws


SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 1000,
    "checkpoint_every": 1,
    "data.init_args.evaluation_count": 2,
    "data.init_args.prompts_per_iteration": 2,
    "data.init_args.batch_size": 2,
    "model.init_args.sampler.init_args.num_steps": 3,
    "model.init_args.sampler.init_args.eval_steps": 2,
    "model.init_args.sampler.init_args.window": [0, 2],
}


def real(monkeypatch):
    """Run commands, rather than their stand-in."""
    command, built = REAL
    monkeypatch.setattr(runs, "COMMAND", command)
    monkeypatch.setattr(facts, "built", built)


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ({"trainer.max_epoch": 3}, "there is no option 'trainer.max_epoch' (did you mean 'trainer.max_epochs'?)"),
        ({"model.init_args.start": "${stage:none}"}, "no such stage"),
        ({"data.init_args.batch_size": 5}, "5"),
    ],
)
def test_every_stage_is_built_before_the_first_one_runs(slip, sentence, monkeypatch, capsys):
    real(monkeypatch)
    write([stage("good", configs=OPD, **SMALL), stage("bad", configs=OPD, **SMALL | slip)])
    monkeypatch.setattr(sys, "argv", ["flowopd", "study", "--config", "study.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert "stage 'bad'" in told
    assert sentence in told
    assert not Path("out").exists()


def test_what_a_run_depends_on_is_its_configuration_and_the_files_that_this_names(monkeypatch):
    real(monkeypatch)
    student = stage("a", configs=OPD, seeds=[0, 1], **{"model.init_args.start": "${stage:merge}"})
    write([stage("merge", configs=MERGE), student])
    plan = read_study(Path("study.yaml"))
    student = plan.stage("a")
    found = facts.facts_of(plan, student, 0, facts.built(student))
    named = {Path(name).name for name in found}
    assert named == {facts.CONFIGURATION, "base", "teacher_composition", "teacher_text", "teacher_crispness", "adapter"}
    assert found["out/merge/seed_0/adapter"] == "missing"
    other = facts.facts_of(plan, student, 1, facts.built(student))
    assert {name for name in found if found[name] != other[name]} == {facts.CONFIGURATION}


@pytest.mark.slow
def test_a_study_of_real_runs_goes_on_where_one_was_cut_off(monkeypatch, capsys):
    real(monkeypatch)
    few = {"trainer.accelerator": "cpu", "data.init_args.evaluation_count": 2}
    student = stage("student", configs=OPD, **SMALL | {"model.init_args.start": "${stage:merge}"})
    write([stage("merge", configs=MERGE, **few), student])

    def interrupt(changed):
        if changed.name == "student":
            while not Path("out/student/seed_0/checkpoints/last.ckpt").exists():
                time.sleep(0.1)
            raise KeyboardInterrupt

    plan = read_study(Path("study.yaml"))
    conductor = runs.Conductor(plan, {one.name: facts.built(one) for one in plan.stages})
    with pytest.raises(KeyboardInterrupt):
        conductor.conduct(interrupt)
    assert study() == 0
    assert "--ckpt_path" in Path("out/student/seed_0.log").read_text()
    iterations = [row["epoch"] for row in read("out/student/seed_0/metrics.csv") if row.get("distill/loss")]
    assert iterations == sorted(set(iterations))
    assert [row["model"] for row in read("out/study.csv")][-2:] == ["merge", "student"]
    before = Path("out/student/seed_0/results.csv").stat().st_mtime_ns
    assert study() == 0
    assert Path("out/student/seed_0/results.csv").stat().st_mtime_ns == before
