"""The laws of generated and published prompts: the official GenEval, splits apart, files whole or not at all."""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from flowopd.cli.main import main
from flowopd.prompts import GenEvalPrompts, OCRPrompts, PromptFile, PromptSource, sets
from flowopd.prompts.files import write
from flowopd.prompts.geneval import COLOURS, NUMBERS, OBJECTS, OFFICIAL_SHA256, RELATIONS, TRAINED, official
from flowopd.prompts.ocr import WORDS, letters, parse, split_of
from flowopd.records import Prompt

# GenEval


def test_the_official_prompts_are_reproduced_byte_for_byte(tmp_path, monkeypatch, capsys):
    data("geneval", tmp_path / "geneval.jsonl", monkeypatch)
    assert hashlib.sha256((tmp_path / "geneval.jsonl").read_bytes()).hexdigest() == OFFICIAL_SHA256
    tags = Counter(prompt.metadata["tag"] for prompt in official())
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert tags == sizes
    assert PromptFile(str(tmp_path / "geneval.jsonl"), "geneval").prompts == list(official())
    assert "wrote 553 prompts" in capsys.readouterr().out


def test_the_test_split_comes_whole_before_it_repeats():
    drawn = GenEvalPrompts("test").draw(600, seed=1)
    assert {prompt.text for prompt in drawn[:553]} == {prompt.text for prompt in official()}
    assert [prompt.text for prompt in drawn[:553]] != [prompt.text for prompt in official()]
    assert drawn == GenEvalPrompts("test").draw(600, seed=1)


@pytest.fixture(scope="module")
def trained() -> list[Prompt]:
    return GenEvalPrompts().draw(6000, seed=0)


def test_what_a_prompt_says_is_what_its_metadata_asks(trained):
    for prompt in [*official(), *trained]:
        assert understood(prompt.text) == prompt.metadata


OBJECT, COLOUR, RELATION = ("|".join(words) for words in (OBJECTS, COLOURS, RELATIONS))
GRAMMAR = {
    "position": rf"an? (?P<a>{OBJECT}) (?P<relation>{RELATION}) an? (?P<b>{OBJECT})",
    "color_attr": rf"an? (?P<one>{COLOUR}) (?P<a>{OBJECT}) and an? (?P<other>{COLOUR}) (?P<b>{OBJECT})",
    "two_object": rf"an? (?P<a>{OBJECT}) and an? (?P<b>{OBJECT})",
    "colors": rf"an? (?P<one>{COLOUR}) (?P<a>{OBJECT})",
    "single_object": rf"an? (?P<a>{OBJECT})",
    "counting": rf"(?P<count>{'|'.join(NUMBERS)}) (?P<a>{OBJECT})(?:es|s)",
}


def understood(text: str) -> dict:
    """A second reading of GenEval's language."""
    tag, said = next((tag, found) for tag in GRAMMAR if (found := re.fullmatch("a photo of " + GRAMMAR[tag], text)))
    named = said.groupdict()
    count = NUMBERS.index(named.get("count", "one"))
    first = {"class": named["a"], "count": count, **({"color": named["one"]} if "one" in named else {})}
    second = {"class": named.get("b"), "count": 1, **({"color": named["other"]} if "other" in named else {})}
    include = [first, second] if "b" in named else [first]
    if tag == "position":
        include = [second, {**first, "position": [named["relation"], 0]}]
    return {"tag": tag, "include": include} | (
        {"exclude": [{"class": named["a"], "count": count + 1}]} if tag == "counting" else {}
    )


def test_training_asks_for_no_picture_of_the_test(trained):
    held_out = {prompt.text for prompt in official()}
    for prompt in trained:
        assert prompt.text not in held_out
        assert swapped(prompt.text) not in held_out


def swapped(text: str) -> str:
    """The same picture in other words: "a dog left of a cat", "a cat right of a dog"."""
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}
    parts = re.fullmatch(rf"a photo of (.*) ({'|'.join(mirror)}) (.*)", text)
    return f"a photo of {parts[3]} {mirror[parts[2]]} {parts[1]}" if parts else text


def test_training_keeps_the_shares_of_the_tags(trained):
    found = Counter(prompt.metadata["tag"] for prompt in trained)
    total = sum(TRAINED.values())
    assert {tag: count / 6000 for tag, count in found.items()} == pytest.approx(
        {tag: share / total for tag, share in TRAINED.items()},
        abs=0.025,  # four standard errors
    )
    only = GenEvalPrompts(tags={"colors": 2, "counting": 0}).draw(50, seed=0)
    assert {prompt.metadata["tag"] for prompt in only} == {"colors"}


def test_objects_and_counts_are_what_was_chosen():
    source = GenEvalPrompts(objects=["person", "cat", "dog", "kite"], max_count=9)
    asked = [clause for prompt in source.draw(300, seed=0) for clause in prompt.metadata["include"]]
    assert {clause["class"] for clause in asked} == {"person", "cat", "dog", "kite"}
    assert {clause["count"] for clause in asked} == set(range(1, 10))
    assert not [clause for clause in asked if clause["class"] == "person" and "color" in clause]


def test_an_excluded_file_is_left_out_and_what_is_exhausted_is_said(tmp_path):
    some = {"objects": ["cat", "dog", "kite"], "tags": {"counting": 1}}
    known = {prompt.text: prompt for prompt in GenEvalPrompts(**some).draw(200, seed=0)}
    first, *others = known.values()
    write(others, tmp_path / "others.jsonl")
    source = GenEvalPrompts(**some, exclude=str(tmp_path / "others.jsonl"))
    assert {prompt.text for prompt in source.draw(20, seed=1)} == {first.text}
    write([first, *others], tmp_path / "all.jsonl")
    with pytest.raises(ValueError, match="no prompt of 'counting' is left outside the test split"):
        GenEvalPrompts(**some, exclude=str(tmp_path / "all.jsonl")).draw(1, seed=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "val"}, "split is 'val'; expected one of train, test"),
        ({"split": "test", "max_count": 5}, "GenEval's test split is fixed"),
        ({"tags": {"single_object": 1}}, r"GenEval trains on position, .*, got \['single_object'\]"),
        ({"tags": {"colors": 0}}, "one share at least must be above 0, got {'colors': 0}"),
        ({"tags": {"colors": -1, "counting": 2}}, "share of colors is -1; expected at least 0.0"),
        ({"tags": {"colors": float("nan")}}, "share of colors is nan; expected a number of at least 0.0"),
        ({"objects": ["cat", "unicorn"]}, r"GenEval's detector does not know \['unicorn'\]"),
        ({"objects": ["cat", "person"]}, "expected two objects besides 'person'"),
        ({"max_count": 11}, "max_count is 11; expected a whole number from 2 to 10"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GenEvalPrompts(**options)


# OCR


@pytest.fixture(scope="module")
def texts() -> dict[str, list[Prompt]]:
    return {split: OCRPrompts(split).draw(2000, seed=0) for split in ("train", "test")}


def test_every_ocr_prompt_quotes_its_target_once(texts):
    for prompt in texts["train"] + texts["test"]:
        assert re.findall(r'"([^"]*)"', prompt.text) == [prompt.metadata["target"]]
        assert 2 <= len(letters(prompt.metadata["target"])) <= len(prompt.metadata["target"]) <= 27
        assert parse(prompt.text) == prompt


def test_ocr_splits_share_no_text_and_repeat_no_prompt(texts):
    train, test = ({letters(prompt.metadata["target"]) for prompt in texts[split]} for split in ("train", "test"))
    assert not train & test
    assert all(len({prompt.text for prompt in drawn}) == len(drawn) == 2000 for drawn in texts.values())
    assert split_of("Open Daily") == split_of("OPENDAILY")


def test_every_word_of_the_lists_is_used(texts):
    drawn = " ".join(prompt.text for prompt in texts["train"]).lower()
    for name, words in WORDS.items():
        if name != "templates":
            assert [word for word in words if word.lower() not in drawn] == []


@pytest.mark.parametrize("source", [GenEvalPrompts("train"), GenEvalPrompts("test"), OCRPrompts("train")])
def test_a_draw_is_a_function_of_its_seed(source):
    assert isinstance(source, PromptSource)
    assert source.draw(30, seed=7) == source.draw(30, seed=7) != source.draw(30, seed=8)
    assert len(source.draw(30, seed=7)) == 30
    assert {prompt.task for prompt in source.draw(30, seed=7)} == {source.task}
    assert source.draw(0, seed=7) == []


def test_an_unknown_ocr_split_is_refused():
    with pytest.raises(ValueError, match="split is 'val'; expected one of train, test"):
        OCRPrompts("val")


def test_a_file_of_ocr_prompts_is_refused_where_it_quotes_nothing(tmp_path):
    (tmp_path / "p.txt").write_text('a sign, "open"\na sign\n')
    with pytest.raises(ValueError, match=r"line 2 of '.*p.txt' is not a prompt of task 'ocr': prompt 'a sign' asks"):
        PromptFile(str(tmp_path / "p.txt"), "ocr", parse)


# Files


def test_any_text_survives_a_file(tmp_path):
    texts = ['say "½ price"', "line\u2028break", "next\x85line", "emoji 🦊 and\ttab", "back\\slash", "ein Würfel"]
    prompts = [Prompt(text, "any", {"number": number}) for number, text in enumerate(texts)]
    write(prompts, tmp_path / "folder" / "p.jsonl")
    assert PromptFile(str(tmp_path / "folder" / "p.jsonl"), "any").prompts == prompts
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["p.jsonl"]
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028and\x85two\r\nthree\r\n".encode())
    assert [p.text for p in PromptFile(str(tmp_path / "p.txt"), "any").prompts] == ["one\u2028and\x85two", "three"]


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "p.jsonl").write_text("precious")
    with pytest.raises(FileExistsError, match=r"p.jsonl' exists; choose another name, or delete it"):
        write([Prompt("a", "any")], tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_text() == "precious"
    with pytest.raises(ValueError, match=r"expected a name that ends in .jsonl, got '.*p.txt'"):
        write([Prompt("a", "any")], tmp_path / "p.txt")


# Published sets


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path) -> Iterator[str]:
    """A folder behind an address on loopback."""
    (tmp_path / "site").mkdir()
    for number, category in enumerate(sets.COMPBENCH_SETS):
        (tmp_path / "site" / f"{category}_val.txt").write_text(f"a {category} prompt\nprompt {number}\n")
    (tmp_path / "site" / "p.txt").write_text("a dog\n\na cat\na dog\n")
    (tmp_path / "site" / "ocr.txt").write_text('a sign, "open"\n')
    (tmp_path / "site" / "empty.txt").write_text("\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "site")))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def data(name, out, monkeypatch, *options):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", ["flowopd", "data", name, "--out", str(out), *options])
    main()


def read(path) -> list[Prompt]:
    return PromptFile(str(path), "any").prompts


@pytest.mark.parametrize("name", ["pickapic", "drawbench"])
@pytest.mark.parametrize("place", ["web", "disk"])
def test_a_published_set_comes_from_the_web_or_the_disk(name, place, site, tmp_path, monkeypatch, capsys):
    source = f"{site}/p.txt" if place == "web" else str(tmp_path / "site" / "p.txt")
    sha256 = hashlib.sha256((tmp_path / "site" / "p.txt").read_bytes()).hexdigest()
    data(name, tmp_path / "one.jsonl", monkeypatch, "--source", source)
    data(name, tmp_path / "two.jsonl", monkeypatch, "--source", source, "--sha256", sha256.upper())
    said = capsys.readouterr().out
    assert [prompt.text for prompt in read(tmp_path / "one.jsonl")] == ["a dog", "a cat"]  # once each
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert f"{sha256} (not checked: give --sha256 to insist on it)" in said
    assert f"{sha256} (as expected)" in said
    assert said.count("licence: ") == said.count("wrote 2 prompts") == 2


def test_compbench_says_the_category(site, tmp_path, monkeypatch, capsys):
    data("compbench", tmp_path / "all.jsonl", monkeypatch, "--source", f"{site}/")
    data("compbench", tmp_path / "one.jsonl", monkeypatch, "--source", str(tmp_path / "site"), "--category", "spatial")
    prompts = read(tmp_path / "all.jsonl")
    assert len(prompts) == 16
    assert {prompt.metadata["category"] for prompt in prompts} == set(sets.COMPBENCH_SETS)
    assert read(tmp_path / "one.jsonl") == [prompt for prompt in prompts if prompt.metadata["category"] == "spatial"]


def test_the_papers_ocr_prompts_get_their_targets(site, tmp_path, monkeypatch, capsys):
    data("ocr_paper", tmp_path / "p.jsonl", monkeypatch, "--source", f"{site}/ocr.txt")
    assert [prompt.metadata for prompt in read(tmp_path / "p.jsonl")] == [{"target": "open"}]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("drawbench", ["--source", "{site}/p.txt", "--sha256", "0" * 64], "p.txt has sha256 .*, expected 000"),
        (
            "drawbench",
            ["--source", "{site}/none.txt"],
            "no prompts from .*none.txt .404 .* by hand and name the --source",
        ),
        ("drawbench", ["--source", "{site}/empty.txt"], "the source holds no prompt"),
        ("drawbench", ["--source", "http://127.0.0.1:9/p.txt"], "no prompts from http://127.0.0.1:9/p.txt"),
        ("pickapic", ["--source", "none.txt"], "prompt file 'none.txt' does not exist"),
        ("ocr_paper", ["--source", "{site}/p.txt"], "prompt 'a dog' asks for no text"),
        ("compbench", ["--sha256", "0"], "one sha256 cannot fit the eight files"),
        ("ocr", ["--count", "0"], "count is 0; expected at least 1"),
        ("geneval", ["--sead", "1"], "there is no option 'sead'"),
        ("geneval", ["--split", "val"], "split is val; expected one of 'train', 'test'"),
    ],
)
def test_a_set_that_cannot_be_had_is_one_sentence_and_no_file(
    name, options, sentence, site, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as end:
        data(name, tmp_path / "p.jsonl", monkeypatch, *[option.format(site=site) for option in options])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert re.match(f"flowopd: error: .*{sentence}.*\n$", said)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_generated_sets_are_written_with_their_metadata(tmp_path, monkeypatch, capsys):
    data("ocr", tmp_path / "ocr.jsonl", monkeypatch, "--split", "test", "--count", "7", "--seed", "3")
    data("geneval", tmp_path / "geneval.jsonl", monkeypatch, "--split", "train", "--count", "9")
    assert PromptFile(str(tmp_path / "ocr.jsonl"), "ocr").prompts == OCRPrompts("test").draw(7, seed=3)
    assert PromptFile(str(tmp_path / "geneval.jsonl"), "geneval").prompts == GenEvalPrompts().draw(9, seed=0)
    assert capsys.readouterr().out.count("licence: ") == 2
    lines = (tmp_path / "ocr.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"target", "prompt"}] * 7


def test_every_address_is_fixed_by_a_commit_and_has_a_licence():
    known = [sets.PICKAPIC, sets.PICKAPIC_SFW, sets.DRAWBENCH, sets.PAPER_OCR, *sets.COMPBENCH_SETS.values()]
    for published in known:
        assert re.match(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/", published.address)
        assert published.licence
    assert len(known) == 12


@pytest.mark.parametrize("include", [None, "cat", [], [None], [{"class": "cat"}], [{"position": 1}, {"class": "cat"}]])
def test_an_excluded_prompt_with_another_metadata_is_named(include, tmp_path):
    write([Prompt("a cat", "geneval", {"include": include, "tag": "colors"})], tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="excluded prompt 'a cat' has an 'include', but not as GenEval's files do"):
        GenEvalPrompts(exclude=str(tmp_path / "p.jsonl"))
