"""The laws of reports: their numbers are the run's, nothing leaves the page, nothing that a run says is HTML."""

import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from PIL import Image

from flowopd.cli.main import main
from flowopd.evaluation import Shots
from flowopd.evaluation.shots import small
from flowopd.report import plots, write
from flowopd.report.pages import page_of_run
from flowopd.report.runs import read_run
from flowopd.report.write import markdown

EVIL = '<script>alert("x")</script><img src=http://evil.example onerror=alert(1)> $a_b$ |*`[c](http://evil.example)'
MODELS = ["base", "teacher-a", "teacher-b", "cold-start", "student"]
MEGABYTE = 2**20


def reward(name: str) -> dict:
    return {"class_path": "flowopd.RewardCallback", "init_args": {"name": name, "in_average": True}}


def make(
    folder: Path,
    scores=("a", "b"),
    iterations: int = 6,
    asked: int = 6,
    count: int = 8,
    prompts=("one", "two"),
    side: int = 32,
    frames: int = 2,
    models=tuple(MODELS),
    table: bool = True,
    name: str = "OPDStudent",
) -> Path:
    """A run folder as a fit leaves it, without a fit."""
    (folder / "images" / "shots").mkdir(parents=True)
    config = {"model": {"class_path": f"flowopd.{name}", "init_args": {}}, "trainer": {"max_epochs": asked}}
    config["trainer"]["callbacks"] = [reward(score) for score in scores]
    config["data"] = {"class_path": "flowopd.RolloutDataModule", "init_args": {"evaluation_count": count}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    numbers = torch.rand(iterations + 1, len(scores) + 3, generator=torch.Generator().manual_seed(len(str(folder))))
    columns = [f"val/{score}" for score in scores] + ["val/average", "distill/loss", "loss_by_step/1"]
    rows = [
        {"epoch": i - 1, "step": i - 1, **dict(zip(columns, map(float, numbers[i]), strict=True))}
        for i in range(iterations + 1)
    ]
    write_csv(folder / "metrics.csv", rows)
    if table:
        cells = [{"model": m, **{s: f"0.{i}{j}" for j, s in enumerate(scores)}} for i, m in enumerate(models)]
        write_csv(folder / "results.csv", [{**row, "average": "0.5", "guidance": "9"} for row in cells])
    facts = {"settings": {"model": name, EVIL: EVIL}, "versions": {"torch": "2"}, "git": "abc"}
    lines = [{"time": "2026-01-01T00:00:00+00:00", "event": "begin", **facts}]
    lines += [{"time": "2026-01-01T00:01:30+00:00", "event": "end"}] if table else []
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for frame in range(frames):
        shots(frame * 5, prompts, ["student"], scores, side).save(
            folder / "images" / "shots" / f"iteration_{frame * 5:05d}.png"
        )
    shots(frames * 5, prompts, list(models), scores, side).save(folder / "images" / "shots" / "models.png")
    return folder


def shots(iteration, prompts, models, scores, side) -> Shots:
    pictures = {model: small(torch.rand(len(prompts), 3, side, side)) for model in models}
    judged = {model: {score: [0.5] * len(prompts) for score in scores} for model in models}
    return Shots(iteration, prompts, ["t"] * len(prompts), pictures, judged)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


class Parsed(HTMLParser):
    """What a browser would make of a page: tags with their attributes, texts, and tables of cells."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.rows[-1] and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


def logged(folder: Path, metric: str) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["epoch"]) + 1: float(row[metric]) for row in csv.DictReader(file) if row[metric]}


def test_curves_are_the_numbers_of_the_log(tmp_path):
    folder = make(tmp_path / "run")
    run, page = read_run(folder), Parsed(write([folder]))
    for score in ("a", "b", "average"):
        known = logged(folder, f"val/{score}")
        assert dict(run.curve(score)) == known
        figure = plots.lines(score, [plots.Line("student", run.curve(score), "k")])
        (line,) = figure.axes[0].lines
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == known
    header = page.rows.index(["iteration", "average", "a", "b"])
    for iteration, *cells in page.rows[header + 1 : header + 8]:
        for score, cell in zip(("average", "a", "b"), cells, strict=True):
            assert float(cell) == pytest.approx(logged(folder, f"val/{score}")[int(iteration)], rel=1e-5)


def outside(tags) -> list:
    """What a page would ask somebody for."""
    asking = [(tag, name, value) for tag, found in tags for name, value in found.items() if name in ("src", "srcset")]
    linked = [(tag, "href", found["href"]) for tag, found in tags if "href" in found]
    held = [(tag, name, value) for tag, name, value in asking if not (value or "").startswith("data:image/")]
    return held + [link for link in linked if not (link[2] or "").startswith(("#", "data:"))]


def test_a_page_asks_nobody_for_anything(tmp_path):
    for page in (
        write([make(tmp_path / "run")]),
        write([make(tmp_path / "a"), make(tmp_path / "b")], tmp_path / "out"),
    ):
        parsed, text = Parsed(page), page.read_text()
        assert not outside(parsed.tags)
        assert "url(" not in text
        assert "@import" not in text
        assert not {"script", "link", "iframe", "object"} & {
            tag for tag, found in parsed.tags if found != {"rel": "icon", "href": "data:,"}
        }


def test_nothing_that_a_run_says_is_html(tmp_path):
    folder = make(tmp_path / "<b>run", scores=(EVIL, "b"), prompts=(EVIL, "two"), models=("base", EVIL, "student"))
    for page in (write([folder]), write([folder, make(tmp_path / "other")], tmp_path / "out")):
        parsed = Parsed(page)
        assert not outside(parsed.tags)
        assert not [found for _, found in parsed.tags if any(name.startswith("on") for name in found)]
        assert "script" not in {tag for tag, _ in parsed.tags}
        assert any(EVIL in text for text in parsed.texts)
        assert "<script" not in page.with_name("report.md").read_text()
    assert "](http" not in re.sub(r"\\.", "", markdown(EVIL))


def test_a_report_of_a_run_is_at_most_three_megabytes(tmp_path):
    """However many iterations, pictures, prompts, models and scores it has."""
    names, models = [f"score {i}" for i in range(13)], ["base", *(f"teacher {i}" for i in range(8)), "student"]
    prompts = [f"a long prompt of number {i}" for i in range(9)]
    folder = make(tmp_path / "run", names, 400, 400, 8, prompts, 192, 13, models)
    assert write([folder]).stat().st_size < 3 * MEGABYTE


def test_not_every_column_is_a_score(tmp_path):
    folder = make(tmp_path / "run")
    assert read_run(folder).scores == ["a", "b", "average"]
    page = Parsed(write([folder]))
    assert ["model", "a", "b", "average", "guidance"] in page.rows
    assert not [row for row in page.rows if row[:1] == ["guidance"]]


def test_a_page_tells_no_path_from_the_root(tmp_path):
    """Where a run lies is nobody's business: paths are told from its folder on."""
    folders = [make(tmp_path / name) for name in ("run", "other")]
    for folder in folders:
        facts = {"command": f"flowopd fit --config {tmp_path}/mine.yaml", "model": "student"}
        facts["settings"] = {"start": "/data/hidden/place/adapter", "root": str(folder), "name": folder.name}
        facts["settings"]["basis"] = str(tmp_path / "base")
        line = {"time": "2026-01-01T00:00:00+00:00", "event": "begin", **facts}
        (folder / "history.jsonl").write_text(json.dumps(line) + "\n")
    for page in (write(folders[:1]), write(folders, tmp_path / "out")):
        for text in (page.read_text(), page.with_name("report.md").read_text()):
            assert str(tmp_path) not in text
            assert "hidden" not in text
    page = Parsed(write(folders[:1]))
    assert ["basis", "../base"] in page.rows
    assert ["start", "…/place/adapter"] in page.rows
    assert ["setting", "run", "other"] in (rows := Parsed(tmp_path / "out" / "report.html").rows)
    assert not [row for row in rows if row[:1] in (["root"], ["basis"])]  # alike, seen from each run


def test_the_trained_model_is_called_what_the_run_says(tmp_path):
    folder = make(tmp_path / "run", models=("base", "teacher"))
    (folder / "history.jsonl").write_text('{"time": "2026-01-01T00:00:00+00:00", "event": "begin", "model": "teacher"}')
    run, page = read_run(folder), Parsed(write([folder]))
    assert (run.ours, run.teachers()) == ("teacher", [])
    assert run.after("a") == run.number("teacher", "a")
    assert ["score", "start", "teacher", "change", "base"] in page.rows


def test_of_many_runs_the_best_are_looked_at_more_closely(tmp_path):
    page = Parsed(write([make(tmp_path / f"run{i}", side=8) for i in range(10)], tmp_path / "out"))
    assert any("the 8 runs with the highest average" in text for text in page.texts)
    assert {f"run{i}" for i in range(10)} <= {row[0] for row in page.rows if row}


def test_several_runs_stand_side_by_side(tmp_path):
    page = write([make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")], tmp_path / "out", "Two of them")
    parsed = Parsed(page)
    assert {"x/run", "y/run"} <= {row[0] for row in parsed.rows if row}
    assert "Two of them" in parsed.texts
    assert not any("not evaluated alike" in text for text in parsed.texts)


def test_runs_of_different_evaluations_are_allowed_and_told(tmp_path):
    page = write([make(tmp_path / "a"), make(tmp_path / "b", count=16)], tmp_path / "out")
    assert "These runs were not evaluated alike: evaluation_count differs." in page.read_text()


def test_the_files_beside_a_page_are_those_that_its_markdown_names(tmp_path):
    page = write([make(tmp_path / "before", frames=6)], tmp_path / "out")
    (page.parent / "mine.png").touch()
    assert write([make(tmp_path / "run", side=128)], tmp_path / "out") == page  # of another run, into the same place
    (page.parent / "mine.png").unlink()
    named = set(re.findall(r"(?<!\\)\]\(([^)]+)\)", page.with_name("report.md").read_text()))
    assert named == {path.name for path in page.parent.iterdir()} - {"report.md", "report.html"}
    for name in named:
        Image.open(page.parent / name).verify()


def test_tables_in_markdown_are_even(tmp_path):
    text = write([make(tmp_path / "run", scores=(EVIL, "b"))]).with_name("report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_a_run_is_finished_stopped_or_still_running(tmp_path):
    done, stopped = make(tmp_path / "done"), make(tmp_path / "stopped", asked=50, table=False)
    with (stopped / "history.jsonl").open("a") as file:
        file.write('{"time": "2026-01-')  # killed while it wrote
    assert read_run(done).state == "finished"
    assert read_run(done).seconds() == 90
    assert read_run(stopped).state == "stopped"
    handle = os.open(stopped, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        page = write([stopped])
    finally:
        os.close(handle)
    assert "iteration 6 of 50 · still running" in page.read_text()


def test_before_and_after_of_a_run_without_a_table_are_of_the_log(tmp_path):
    run = read_run(make(tmp_path / "run", asked=50, table=False))
    curve = logged(run.folder, "val/a")
    assert (run.before("a"), run.after("a")) == (curve[0], curve[6])


def test_pictures_are_read_as_they_were_written(tmp_path):
    written = shots(5, ("one", "two"), ["base", "student"], ["a"], 32)
    written.save(tmp_path / "x.png")
    read = Shots.read(tmp_path / "x.png")
    assert read.scores == written.scores
    assert [p.tobytes() for p in read.pictures["student"]] == [p.tobytes() for p in written.pictures["student"]]


BAD = {
    "nothing": ([], "there is no run to report on; give one run folder or several"),
    "a folder": (["."], "'.' is no run folder (it has no config.yaml)"),
    "no folder": (["gone"], "'gone' is no run folder (there is no such folder)"),
    "twice": (["run", "./run"], "a run folder is given twice"),
    "nothing yet": (["empty"], "run folder 'empty' has no metrics.csv and no results.csv yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("model: null\n")
    words, says = BAD[case]
    monkeypatch.setattr(sys, "argv", ["flowopd", "report", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err.strip()
    assert says in told
    assert "\n" not in told


def test_text_comes_before_plots(tmp_path):
    kinds = [
        block.kind for section in page_of_run(read_run(make(tmp_path / "run"))).sections for block in section.blocks
    ]
    assert kinds.index("grid") < kinds.index("cards") < kinds.index("figures")


# ------------------------------------------------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", () => {
  const dead = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify({images: document.images.length, dead, wide, width: innerWidth});
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_all_of_it_and_asks_nobody(tmp_path, width):
    """No error in its console, every picture loads, nothing is wider than the window, and no request leaves."""
    page = write([make(tmp_path / "run", scores=(EVIL, "b"), prompts=(EVIL, "two"))])
    probed = page.with_name("probed.html")
    probed.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text()).replace("</body>", PROBE))
    found, _ = browse(probed, tmp_path, width)
    facts = json.loads(re.search(r"<title>(.*?)</title>", found)[1])
    assert facts["images"] > 5
    assert facts["dead"] == 0
    assert facts["wide"] <= 0
    _, said = browse(page, tmp_path, width)
    assert "CONSOLE" not in said
    asked = re.findall(r'"url":"(?!data:|file:|chrome)([^"]*)', (tmp_path / "net.json").read_text())
    assert not [url for url in asked if "evil.example" in url]


def browse(page: Path, folder: Path, width: int) -> tuple[str, str]:
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    quiet += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command = [BROWSER, *quiet, f"--log-net-log={folder / 'net.json'}", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------ what runs log


@pytest.fixture
def fitted(tiny_pipeline, tmp_path):
    from flowopd.teachers import LoRATeacher
    from flowopd.training import OPDStudent, ResultsTable, RewardCallback, TeacherCallback
    from flowopd.training.callbacks.log import MetricsFile
    from flowopd.training.callbacks.spent import Spent
    from flowopd.training.callbacks.start import StartScores

    expert = tiny.expert(tmp_path / "expert", tiny_pipeline, std=0.5)
    teachers = [TeacherCallback([task], LoRATeacher(expert, guidance_scale=2.0)) for task in ("red", "green")]
    callbacks = [*teachers, RewardCallback("red", tiny.Brightness()), ResultsTable(), Spent(), StartScores()]
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=expert)
    log, data = MetricsFile(tmp_path / "metrics.csv"), tiny.data("red", "green")
    trainer = tiny.trainer(tmp_path, callbacks, 2, logger=log, limit_val_batches=1.0, log_every_n_steps=1)
    trainer.fit(policy, data)
    return log.rows, policy, data, callbacks, tmp_path


def test_losses_by_task_and_by_step_are_parts_of_the_loss(fitted):
    rows, policy, *_ = fitted
    for step, row in rows.items():
        if step < 0:
            continue
        tasks = [value for name, value in row.items() if name.startswith("loss_by_task/")]
        steps = [value for name, value in row.items() if name.startswith("loss_by_step/")]
        assert len(tasks) == 2
        assert len(steps) == policy.batches_per_rollout()
        assert sum(tasks) / len(tasks) == pytest.approx(row["distill/loss"], rel=1e-4)
        assert sum(steps) / len(steps) == pytest.approx(row["distill/loss"], rel=1e-4)


def test_a_run_spends_what_a_plan_says(fitted):
    from flowopd.preflight.forwards import TRAINED, count_forwards

    rows, policy, data, callbacks, _ = fitted
    last = rows[max(rows)]
    updates = max(rows) + 1
    planned = count_forwards(policy, data, callbacks[:3])
    assert last["spent/forwards"] == updates * sum(n for name, n in planned.items() if "decoded" not in name)
    assert last["spent/backwards"] == updates * planned[TRAINED]
    assert last["spent/pictures"] == 2 * 8


def test_a_log_begins_with_what_the_run_starts_from(fitted):
    rows, *_, folder = fitted
    with (folder / "results.csv").open(newline="") as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert rows[-1]["epoch"] == -1
    assert f"{rows[-1]['val/red']:.3f}" == table["cold-start"]["red"]
