"""The laws of prompts: files that are read or refused in words, mixtures that keep their shares."""

import json
from itertools import chain

import pytest
import tiny

from flowopd.prompts import Mixture, PromptFile
from flowopd.records import Prompt


def file(folder, name: str, *lines: str) -> str:
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


def test_a_text_file_has_a_prompt_per_line(tmp_path):
    source = PromptFile(file(tmp_path, "p.txt", "a red dog", "", "  ein grüner Würfel "), "draw")
    assert source.prompts == [Prompt("a red dog", "draw"), Prompt("ein grüner Würfel", "draw")]


def test_a_json_file_keeps_what_a_reward_may_need(tmp_path):
    lines = [json.dumps({"prompt": "two cats", "count": 2}), json.dumps({"text": "a dog", "tag": "single"})]
    first, second = PromptFile(file(tmp_path, "p.jsonl", *lines), "draw").prompts
    assert (first.text, first.metadata) == ("two cats", {"count": 2})
    assert (second.text, second.metadata) == ("a dog", {"tag": "single"})


def shout(text: str) -> Prompt:
    if "!" in text:
        raise ValueError("no shouting")
    return Prompt(text, "any", {"length": len(text)})


def test_a_parser_adds_its_facts_and_refuses_by_line(tmp_path):
    (prompt,) = PromptFile(file(tmp_path, "p.jsonl", '{"text": "abc", "mine": 1}'), "draw", shout).prompts
    assert (prompt.task, prompt.metadata) == ("draw", {"length": 3, "mine": 1})
    with pytest.raises(ValueError, match=r"line 2 of '.*p.txt' is not a prompt of task 'draw': no shouting"):
        PromptFile(file(tmp_path, "p.txt", "abc", "abc!"), "draw", shout)


def test_a_trigger_stands_before_every_text_that_lacks_it(tmp_path):
    path = file(tmp_path, "p.txt", "a cat", "a dog, SKS Toy", "abc")
    texts = [prompt.text for prompt in PromptFile(path, "draw", trigger="sks toy").prompts]
    assert texts == ["sks toy a cat", "a dog, SKS Toy", "sks toy abc"]
    (kept,) = PromptFile(file(tmp_path, "q.txt", "abc"), "draw", shout, "sks").prompts
    assert (kept.text, kept.metadata) == ("sks abc", {"length": 3})  # a parser reads what the file says


LINES = {  # of a .jsonl file, and what is said of them
    "{broken": r"it is not JSON, one object per line \(Expecting property name .* at column 2\)",
    "{": "it is not JSON, one object per line",
    "a dog": "it is not JSON",
    '{"prompt": "a dog"} {"prompt": "a cat"}': "it is not JSON, one object per line",
    '"a dog"': r"expected a JSON object with 'text' or 'prompt', got \"a dog\"",
    '["a dog"]': "expected a JSON object",
    "7": "expected a JSON object",
    "null": "expected a JSON object",
    "{}": r"expected its text as 'text' or as 'prompt', got \[\]",
    '{"caption": "a dog"}': r"expected its text as 'text' or as 'prompt', got \['caption'\]",
    '{"prompt": "a sign", "text": "open"}': "expected its text as 'text' or as 'prompt', got both",
    '{"text": ""}': 'text is ""; expected a text',
    '{"text": " "}': "expected a text",
    '{"prompt": null}': "prompt is null; expected a text",
    '{"prompt": 7}': "prompt is 7; expected a text",
    '{"prompt": ["a dog"]}': r'prompt is \["a dog"\]; expected a text',
    '{"prompt": {"text": "a dog"}}': "expected a text",
    '{"prompt": "a dog", "prompt": "a cat"}': "it says 'prompt' twice",
    '{"prompt": "a dog", "of": {"n": 1, "n": 2}}': "it says 'n' twice",
    '{"prompt": "a dog", "count": NaN}': "NaN is no number of JSON; say null",
    '{"prompt": "a dog", "count": -Infinity}': "-Infinity is no number of JSON",
    '{"prompt": "half \\ud83e"}': "holds what no text has",
    '{"prompt": "a\\u0000dog"}': "holds what no text has",
    '{"prompt": "a dog", "deep": ' + "[" * 100_000: "it is nested too deeply",
    '{"prompt": "a dog", "n": ' + "1" * 5000 + "}": "Exceeds the limit",
}


@pytest.mark.parametrize(("line", "sentence"), LINES.items(), ids=[line[:40] for line in LINES])
def test_a_line_that_is_no_prompt_is_one_sentence_with_its_file_and_number(tmp_path, line, sentence):
    with pytest.raises(ValueError, match=rf"^line 3 of '.*' is not a prompt of task 'draw': .*{sentence}") as refused:
        PromptFile(file(tmp_path, "p.jsonl", '{"prompt": "a dog"}', "", line), "draw")
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 400


FILES = {  # of other kinds, and what is said of them
    "p.json": (b'[{"prompt": "a dog"}]', "neither .txt nor .jsonl; write one JSON object per line into a .jsonl file"),
    "p.csv": (b"prompt\na dog", "neither .txt nor .jsonl; write one prompt per line"),
    "p.parquet": (b"PAR1", "neither .txt nor .jsonl"),
    "p.jsonl.gz": (b"\x1f\x8b", "neither .txt nor .jsonl"),
    "prompts": (b"a dog", "neither .txt nor .jsonl"),
    "json.txt": (b'a cat\n{"prompt": "a dog"}', "line 2 of .* it looks like JSON; .* a name that ends in .jsonl"),
    "latin.txt": ("a cat\r\ncafé".encode("latin-1"), r"line 2 of .* is not UTF-8 \(byte 0xe9\); save the file as"),
    "latin.jsonl": (b'{"prompt": "caf\xe9"}', r"line 1 of .* is not UTF-8 \(byte 0xe9\)"),
    "wide.txt": ("a dog".encode("utf-16"), r"line 1 of .* is not UTF-8 \(byte 0xff\)"),
    "wider.txt": ("a dog".encode("utf-16-le"), "line 1 of .* holds what no text has; is it UTF-8"),
    "empty.txt": (b"", "holds no prompt; expected one per line"),
    "blank.txt": (b" \n\t\n", "holds no prompt"),
    "bom.jsonl": ("\ufeff\n".encode(), "holds no prompt"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_one_sentence(tmp_path, name):
    content, sentence = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        PromptFile(str(tmp_path / name), "draw")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompt file '.*none.txt' does not exist"):
        PromptFile(str(tmp_path / "none.txt"), "draw")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder.txt' is a folder; name a file in it"):
        PromptFile(str(tmp_path / "folder.txt"), "draw")
    with (tmp_path / "huge.txt").open("wb") as huge:
        huge.truncate(1 << 31)  # takes no room
    with pytest.raises(ValueError, match=r"huge.txt' has 2147483648 bytes; expected 1073741824 at most"):
        PromptFile(str(tmp_path / "huge.txt"), "draw")


def signed(text: str) -> Prompt:
    return Prompt(text, "ocr", {"target": text})


def test_a_file_does_not_take_back_the_text_that_its_prompt_says(tmp_path):
    line = '{"prompt": "open", "target": null}'
    with pytest.raises(ValueError, match=r"line 1 of .*: target is null; its text says 'open'"):
        PromptFile(file(tmp_path, "p.jsonl", line), "ocr", signed)
    (prompt,) = PromptFile(file(tmp_path, "p.jsonl", line.replace("null", '"shut"')), "ocr", signed).prompts
    assert prompt.metadata == {"target": "shut"}


def quarrelsome(text: str) -> Prompt:
    return {"a dog": Prompt("a dog", "any"), "nothing": None}[text]


def test_whatever_a_parser_raises_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"line 2 of .* is not a prompt of task 'draw': KeyError: 'a cat'"):
        PromptFile(file(tmp_path, "p.txt", "a dog", "a cat"), "draw", quarrelsome)
    with pytest.raises(ValueError, match=r"line 1 of .* is not a prompt of task 'draw': parse gave None; expected"):
        PromptFile(file(tmp_path, "p.txt", "nothing"), "draw", quarrelsome)


def test_a_file_is_drawn_in_shuffled_passes(tmp_path):
    source = PromptFile(file(tmp_path, "p.txt", *"abcdefgh"), "draw")
    drawn = [prompt.text for prompt in source.draw(20, seed=3)]
    assert sorted(drawn[:8]) == sorted(drawn[8:16]) == list("abcdefgh")
    assert drawn[:8] != drawn[8:16]
    assert len(drawn) == 20
    assert source.draw(20, seed=3) == source.draw(20, seed=3) != source.draw(20, seed=4)


def mixture(**options) -> Mixture:
    return Mixture({task: tiny.Words(task) for task in ("ocr", "geneval")}, **options)


def tasks(prompts) -> list[str]:
    return [prompt.task for prompt in prompts]


def test_every_iteration_mixes_the_tasks_in_their_shares():
    drawn = mixture(ratio={"ocr": 1, "geneval": 3}).draw(8, iteration=5, seed=0)
    assert sorted(tasks(drawn)) == ["geneval"] * 6 + ["ocr"] * 2
    assert sorted(tasks(mixture().draw(8, 0, 0))) == ["geneval"] * 4 + ["ocr"] * 4


def test_alternating_tasks_follow_the_ratio():
    """Whole iterations, as the released code alternates OCR 1 : GenEval 3."""
    alternating = mixture(ratio={"ocr": 1, "geneval": 3}, alternate=True)
    iterations = [tasks(alternating.draw(4, iteration, 0)) for iteration in range(8)]
    assert all(len(set(iteration)) == 1 for iteration in iterations)
    assert list(chain.from_iterable(iteration[:1] for iteration in iterations)) == (["ocr"] + ["geneval"] * 3) * 2


def test_prompts_depend_on_iteration_and_seed_alone():
    assert mixture().draw(4, 2, 1) == mixture().draw(4, 2, 1)
    assert mixture().draw(4, 2, 1) != mixture().draw(4, 3, 1)
    assert mixture().draw(4, 2, 1) != mixture().draw(4, 2, 2)


def test_shares_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"6 prompts per iteration do not divide into shares \{'ocr': 1, 'geneval': 3\}"
    ):
        mixture(ratio={"ocr": 1, "geneval": 3}).draw(6, 0, 0)
    with pytest.raises(ValueError, match="ratio says nothing of task 'geneval', the prompts are of geneval, ocr"):
        mixture(ratio={"ocr": 1})
    with pytest.raises(ValueError, match="at least one task, got none"):
        Mixture({})


@pytest.mark.parametrize(
    "options",
    [{"count": 0, "iteration": 0}, {"count": 2.5, "iteration": 0}, {"count": 4, "iteration": -1}],
    ids=["none", "half", "before"],
)
def test_an_iteration_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"(count|iteration) is (0|2.5|-1); expected "):
        mixture().draw(**options, seed=0)


@pytest.mark.parametrize("share", [-1, 0.5, True])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=f"share of ocr is {share}; expected "):
        mixture(ratio={"ocr": share, "geneval": 1})
    with pytest.raises(ValueError, match=r"one share at least must be above 0, got \{'ocr': 0, 'geneval': 0\}"):
        mixture(ratio={"ocr": 0, "geneval": 0})
