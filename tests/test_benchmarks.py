"""The laws of benchmarks: scored once, alike for every batch size and number of ranks, of prompts nobody trained on."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from ranks import run_ranks
from torch import Tensor

from flowopd.cli import run as command_line
from flowopd.cli.main import main
from flowopd.evaluation.benchmark import Benchmark
from flowopd.evaluation.comparison import Summary
from flowopd.evaluation.ledger import Ledger, Picture
from flowopd.evaluation.paper import TABLES
from flowopd.models import Merge
from flowopd.records import Prompt
from flowopd.teachers import AdapterTeacher, BaseTeacher, LoRATeacher
from flowopd.tiles import Legibility, TilesPrompts, render
from flowopd.training import EMA, Benchmarks, CheckpointAdapter, Contenders, OPDStudent, RewardCallback, TeacherCallback

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory) -> str:
    return tiny.expert(tmp_path_factory.mktemp("experts") / "expert", tiny_pipeline, std=0.5)


class Killed(Exception):
    """In place of a signal."""


class Watched:
    """Brightness that counts what it scores, and dies after so many prompts."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen: Counter[str] = Counter()
        self._dies_after = dies_after

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        self.seen.update(prompt.text for prompt in prompts)
        if self._dies_after is not None and sum(self.seen.values()) > self._dies_after:
            raise Killed
        return tiny.Brightness().score(images, prompts)


def benchmark(reward=None, **options) -> Benchmark:
    rewards = {"bright": reward or tiny.Brightness()}
    sizes = {"count": 5, "images_per_prompt": 2, "steps": 2, "best_of_n": ["bright"]}
    return Benchmark(tiny.Words("red"), rewards, {"green": tiny.Brightness(1)}, **(sizes | options))


def contenders(pipeline: str, expert: str, **more) -> Contenders:
    return Contenders(tiny.backbone(pipeline), {"base": BaseTeacher(), "expert": LoRATeacher(expert), **more})


def score(folder, models: Contenders, one: Benchmark, batch_size: int = 4, trainer=None, **options) -> None:
    data = Benchmarks({"words": one}, batch_size=batch_size, summary=Summary({"Bright": "words/bright"}), **options)
    tiny.trainer(folder, **(trainer or {})).test(models, data, verbose=False)


def left(folder) -> dict[str, str]:
    """Every table."""
    return {path.name: path.read_text() for path in [folder / "results.md", *(folder / "tables").iterdir()]}


def pictures(folder, model: str = "expert") -> list[Picture]:
    return Ledger(folder / "benchmarks" / "words" / model).pictures()


def test_an_evaluation_that_was_killed_ends_in_the_same_table_and_scores_nothing_twice(tiny_pipeline, tmp_path, expert):
    whole, straight = tmp_path / "whole", Watched()
    score(whole, contenders(tiny_pipeline, expert), benchmark(straight))
    again, dies = tmp_path / "again", Watched(dies_after=14)
    with pytest.raises(Killed):
        score(again, contenders(tiny_pipeline, expert), benchmark(dies))
    (torn,) = (again / "benchmarks" / "words" / "expert").glob("*.jsonl")
    torn.write_bytes(torn.read_bytes() + b'{"prompt": 3, "ima')
    kept = len(pictures(again, "base")) + len(pictures(again))
    goes_on = Watched()
    score(again, contenders(tiny_pipeline, expert), benchmark(goes_on))
    assert left(again) == left(whole)
    assert pictures(again) == pictures(whole)
    assert sum(straight.seen.values()) == 2 * 5 * 2 == kept + sum(goes_on.seen.values())
    nothing = Watched()
    score(again, contenders(tiny_pipeline, expert), benchmark(nothing))
    assert not nothing.seen


@pytest.mark.parametrize("batch_size", [1, 20])
def test_scores_do_not_depend_on_the_batch_size(tiny_pipeline, tmp_path, expert, batch_size):
    score(tmp_path / "four", contenders(tiny_pipeline, expert), benchmark())
    score(tmp_path / "other", contenders(tiny_pipeline, expert), benchmark(), batch_size)
    for one, other in zip(pictures(tmp_path / "four"), pictures(tmp_path / "other"), strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-6)
        assert (one.text, one.seed, one.file) == (other.text, other.seed, other.file)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_write_the_tables_of_one(tiny_pipeline, tmp_path, expert, strategy):
    score(tmp_path / "one", contenders(tiny_pipeline, expert), benchmark())
    two = {"strategy": strategy, "devices": 2}
    run_ranks(lambda: score(tmp_path / "two", contenders(tiny_pipeline, expert), benchmark(), trainer=two))
    assert left(tmp_path / "two") == left(tmp_path / "one")
    assert len(list((tmp_path / "two" / "benchmarks" / "words" / "expert").glob("*.jsonl"))) == 2


def test_models_draw_from_the_same_noise_and_diffusers_from_it_too(tiny_pipeline, tmp_path, expert):
    score(tmp_path, contenders(tiny_pipeline, expert, twin=LoRATeacher(expert)), benchmark())
    drawn = {model: pictures(tmp_path, model) for model in ("base", "expert", "twin")}
    seeds = {model: [picture.seed for picture in found] for model, found in drawn.items()}
    assert seeds["base"] == seeds["expert"] == seeds["twin"]
    assert len(set(seeds["base"])) == 10
    assert drawn["expert"] == drawn["twin"] != drawn["base"]
    pipe = tiny.loaded(tiny_pipeline).pipeline
    pipe.set_progress_bar_config(disable=True)
    first = drawn["base"][0]
    noise = torch.Generator().manual_seed(first.seed)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "pt"}
    image = pipe(first.text, height=16, width=16, generator=noise, **options).images
    assert float(image[:, 0].mean()) == pytest.approx(first.scores["bright"], abs=1e-4)


def test_every_table_says_how_many_prompts_and_seeds(tiny_pipeline, tmp_path, expert):
    score(tmp_path, contenders(tiny_pipeline, expert), benchmark())
    tables = {name: text for name, text in left(tmp_path).items() if name.endswith(".csv")}
    assert tables.keys() == {
        "summary.csv",
        "summary-minus-base.csv",
        "words.csv",
        "words-minus-base.csv",
        "words-stability.csv",
    }
    for text in tables.values():
        header, *rows = text.splitlines()
        assert header.startswith("model,prompts,seeds,")
        assert {tuple(row.split(",")[1:3]) for row in rows} == {("5", "2")}
    assert "bright, worst tenth" in tables["words-stability.csv"]
    assert "green (judge) minus base" in tables["words-stability.csv"]
    assert "sharpness change" in tables["words-stability.csv"]


def test_more_models_and_prompts_leave_what_is_there(tiny_pipeline, tmp_path, expert):
    score(tmp_path, contenders(tiny_pipeline, expert), benchmark(Watched()))
    before, more = pictures(tmp_path), Watched()
    merge = AdapterTeacher(Merge([expert], weights=[0.5]), guidance_scale=1.0)
    score(tmp_path, contenders(tiny_pipeline, expert, merge=merge), benchmark(more, count=6))
    assert pictures(tmp_path)[: len(before)] == before
    assert len(pictures(tmp_path, "merge")) == len(pictures(tmp_path)) == 12
    assert sum(more.seen.values()) == 2 + 2 + 12


def test_a_checkpoint_gives_the_average_and_the_weights_themselves(tiny_pipeline, tmp_path, expert):
    signals = [TeacherCallback(["red"], LoRATeacher(expert)), RewardCallback("red", tiny.Brightness())]
    policy, ema = tiny.policy(OPDStudent, tiny_pipeline, lr=20.0), EMA(0.9)
    trainer = tiny.trainer(tmp_path, [*signals, ema], max_epochs=3, enable_checkpointing=True)
    trainer.fit(policy, tiny.data())
    ema.swap_out(policy)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    raw = CheckpointAdapter(str(tmp_path / "some.ckpt"), average=False).adapter()
    assert raw.fingerprint() == policy.student().fingerprint()
    average = CheckpointAdapter(str(tmp_path / "some.ckpt")).adapter()
    shadow = dict(zip(policy.student().tensors, ema.state_dict()["shadow_params"], strict=True))
    assert all(torch.equal(average.tensors[key], value) for key, value in shadow.items())
    assert average.fingerprint() != raw.fingerprint()


# --------------------------------------------------------------------------------------------------- what is held out


@pytest.mark.parametrize(
    "recipe", ["opd", "opd_full", "grpo_mix", "teacher_composition", "teacher_text", "cold_start_sft"]
)
def test_no_prompt_of_a_benchmark_occurs_in_training(recipe):
    """Of all that the recipes of the tiles world train on, what a prompt asks for: many draws of several seeds."""
    benchmarks = yaml.safe_load((CONFIGS / "tiles" / "benchmark.yaml").read_text())["data"]["init_args"]["benchmarks"]
    given = [one["init_args"]["prompts"]["init_args"] for one in benchmarks.values()]
    held = {
        asked(p) for g in given for p in Benchmark(TilesPrompts(**g), {"r": tiny.Brightness()}, count=256).prompts()
    }
    assert len(held) > 300
    trained = yaml.safe_load((CONFIGS / "tiles" / f"{recipe}.yaml").read_text())["data"]["init_args"]["prompts"]
    for source in trained.values():
        for seed in range(4):
            assert not held & {asked(prompt) for prompt in TilesPrompts(**source["init_args"]).draw(2000, seed)}


def asked(prompt: Prompt) -> str:
    return str(prompt.metadata.get("word") or sorted(prompt.metadata["clauses"]))


def test_prompts_are_all_different():
    texts = [
        prompt.text for prompt in Benchmark(TilesPrompts("composition", "test"), {"r": tiny.Brightness()}).prompts()
    ]
    assert len(set(texts)) == len(texts) == 256
    with pytest.raises(ValueError, match=r"count is 1001, but .* gives no more than 1000 different prompts"):
        benchmark(count=1001).prompts()


# -------------------------------------------------------------------------------------------------------------- judges


def test_the_second_reader_of_tiles_knows_glyphs_from_smears():
    prompts = TilesPrompts("composition").draw(8, 0) + TilesPrompts("text").draw(8, 0)
    clean = render(prompts, 0)
    assert (Legibility().score(clean, prompts) == 1).all()
    blurred = torch.nn.functional.avg_pool2d(clean, 5, 1, 2, count_include_pad=False)
    assert (Legibility().score(blurred, prompts) < 0.95).all()
    assert (Legibility().score(torch.full_like(clean, 0.97), prompts) == 0).all()


# ------------------------------------------------------------------------------------------------ what cannot be meant


def test_results_of_another_run_are_refused(tiny_pipeline, tmp_path, expert):
    score(tmp_path, contenders(tiny_pipeline, expert), benchmark())
    other = tiny.expert(tmp_path / "other", tiny_pipeline, seed=5)
    another = contenders(tiny_pipeline, expert)
    another.backbone.negative_prompt = "red"
    before = left(tmp_path)
    for models, one, reason in [
        (contenders(tiny_pipeline, other), benchmark(), "weights was "),
        (contenders(tiny_pipeline, expert), benchmark(steps=3), "steps was 2 there, and is 3 now"),
        (contenders(tiny_pipeline, expert), benchmark(tiny.Brightness(2)), "rewards was "),
        (another, benchmark(), "base was "),
    ]:
        with pytest.raises(ValueError, match=rf"holds the results of another run: {reason}.*; give another"):
            score(tmp_path, models, one)
    assert left(tmp_path) == before


def test_an_adapter_of_another_base_is_refused_by_its_name_in_the_table(tiny_pipeline, tmp_path):
    foreign = tmp_path / "foreign"
    from flowopd.tiles import asset

    tiny.expert(foreign, str(asset("base")))
    with pytest.raises(ValueError, match=r"model 'expert' cannot be scored: .* does not fit this network"):
        score(tmp_path, contenders(tiny_pipeline, str(foreign)), benchmark())
    assert not (tmp_path / "benchmarks").exists()


def test_pictures_have_the_names_that_the_scripts_of_compbench_read(tiny_pipeline, tmp_path, expert):
    score(tmp_path, contenders(tiny_pipeline, expert), benchmark(files="samples/{text}_{id:06d}.png"))
    names = {path.name for path in (tmp_path / "benchmarks" / "words" / "expert" / "samples").iterdir()}
    assert names == {f"red {1 + i // 2}_{i:06d}.png" for i in range(10)}


@pytest.mark.parametrize("table", ["table2", "table4", "compbench"])
def test_the_papers_tables_are_built(table, tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    monkeypatch.chdir(tmp_path)
    made, folder = [], CONFIGS / "sd35" / "tables"
    for path in re.findall(r"prompts/\w+\.jsonl", (folder / f"{table}.yaml").read_text()):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text('{"prompt": "a sign that says \\"OPEN\\""}\n')
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda cli, _: made.append(cli))
    words = ["test", "--config", str(folder / "models.yaml"), "--config", str(folder / f"{table}.yaml")]
    monkeypatch.setattr(sys, "argv", ["flowopd", *words, "--trainer.accelerator=cpu", "--trainer.precision=32-true"])
    main()
    (cli,) = made
    assert len(cli.model.models) == 10
    if cli.datamodule.summary is not None:
        assert list(cli.datamodule.summary.columns) == list(TABLES[table]["Flow-OPD (Merge)"])


REFUSED = {
    "files is 'x.png', which gives two pictures one name": lambda: benchmark(files="x.png"),
    "files is '{tag}.png'; it may say {prompt}": lambda: benchmark(files="{tag}.png"),
    "column 'Bright' is of benchmark 'words'": lambda: Benchmarks(
        {"word": benchmark()}, summary=Summary({"Bright": "words/bright"})
    ),
    "has no score 'brigth' (did you mean 'bright'?)": lambda: Benchmarks(
        {"words": benchmark()}, summary=Summary({"Bright": "words/brigth"})
    ),
    "paper is 'tabel2' (did you mean 'table2'?); expected one of table2, table3, table4": lambda: Summary(
        {}, paper="tabel2"
    ),
    "divided_by names 'DeQa'": lambda: Summary({"DeQA": "a/b"}, {"DeQa": 5}),
    "macro names 'brght'": lambda: benchmark(macro=["brght"]),
    "a benchmark is called 'a/b'": lambda: Benchmarks({"a/b": benchmark()}),
    "there is no benchmark": lambda: Benchmarks({}),
    "a benchmark scores nothing": lambda: Benchmark(tiny.Words("red"), {}),
    "says no 'tag', by which": lambda: benchmark(group_by="tag").group_of(Prompt("red", "red")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_meant_is_refused(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        REFUSED[sentence]()


def test_the_command_line_says_what_is_missing_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowopd.rewards.ocr.find_spec", lambda name: None)
    monkeypatch.setattr(command_line.LightningCLI, "_run_subcommand", lambda *_: None)
    config = ["test", "--config", str(CONFIGS / "tiles" / "benchmark.yaml"), "--trainer.accelerator=cpu"]
    judge = "--data.init_args.benchmarks.text.init_args.judges={ocr: {class_path: flowopd.rewards.OCR}}"
    column = "--data.init_args.summary.columns={text: txt/text}"
    for word, sentence in [(judge, "the OCR reward needs"), (column, "(did you mean 'text'?)")]:
        monkeypatch.setattr(sys, "argv", ["flowopd", *config, word])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line


def test_a_stopped_command_goes_on_in_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["test", "--config", str(CONFIGS / "tiles" / "benchmark.yaml"), "--trainer.accelerator=cpu"]
    words += ["--trainer.default_root_dir=run", "--data.init_args.against=[base]"]
    words += ["--model.init_args.models={base: {class_path: flowopd.BaseTeacher}}"]
    for name in ("composition", "text"):
        at = f"--data.init_args.benchmarks.{name}.init_args"
        words += [f"{at}.count=3", f"{at}.steps=2", f"{at}.images_per_prompt=1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["flowopd", *words])
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lines = (tmp_path / "run/benchmarks/text/base/pictures-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [f"{n:05d}_0.png" for n in range(3)]
    assert (tmp_path / "run/benchmarks/text/base/00002_0.png").is_file()
    assert "base" in capsys.readouterr().out
