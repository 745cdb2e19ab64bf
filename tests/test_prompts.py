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


@pytest.mark.parametrize("line", ["{broken", '{"caption": "a dog"}', '"a dog"', '["a dog"]', '{"text": ""}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    with pytest.raises(ValueError, match=r"line 1 of '.*p.jsonl' is not a prompt of task 'draw'"):
        PromptFile(file(tmp_path, "p.jsonl", line), "draw")


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompt file '.*none.txt' does not exist"):
        PromptFile(str(tmp_path / "none.txt"), "draw")
    with pytest.raises(ValueError, match=r"prompt file '.*empty.txt' holds no prompt; expected one per line"):
        PromptFile(file(tmp_path, "empty.txt", "", ""), "draw")


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
    with pytest.raises(ValueError, match=r"ratio names tasks \['ocr'\], the prompts are of \['geneval', 'ocr'\]"):
        mixture(ratio={"ocr": 1})
    with pytest.raises(ValueError, match="at least one task, got none"):
        Mixture({})
