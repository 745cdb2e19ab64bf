"""The laws of the OCR reward: its rule in closed form, what it reads, and workers that change nothing."""

import os
import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from benchmarks.ocr import STYLES, rendered
from jsonargparse import ArgumentParser

from flowopd.prompts import OCRPrompts
from flowopd.prompts.ocr import letters
from flowopd.records import Prompt
from flowopd.rewards import OCR, DetailedReward, Reward, ocr
from flowopd.rewards.ocr import closeness


def asking(target: str) -> Prompt:
    return Prompt(f'a sign that says "{target}"', "ocr")


def blank(count: int = 1) -> torch.Tensor:
    return torch.full((count, 3, 64, 64), 255, dtype=torch.uint8)


@pytest.fixture
def written(monkeypatch):
    """Let the engine read what a test says instead of the picture."""

    def say(*lines):
        answers = iter(lines)

        def engine(image):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(txts=answer)

        monkeypatch.setattr(ocr, "_engine", lambda: engine)

    return say


SAME = {  # to a reader
    "E\u0301TE\u0301": "été",  # an accent of its own
    "STRASSE": "Straße",
    "\uff2f\uff30\uff25\uff2e\uff01": "open!",  # of full width
    "oﬃce": "office",
    "ΛΕΣ": "λες",  # a sigma at the end of a word
    "½ price": "1/2 price",
    "CO₂": "co2",
    "Wait…": "wait...",
    "open\u00a0daily": "open daily",
    "o\u200bpen\ufeff": "open",
    "don\u2019t": "don't",
    "“now”": '"now"',
    "9–5": "9-5",
}


@pytest.mark.parametrize(("found", "target"), SAME.items(), ids=SAME.values())
def test_what_a_reader_calls_the_same_text_is_the_same(written, found, target):
    for read, asked in ((found, target), (target, found)):
        written((read,))
        scores = OCR().detail(blank(), [Prompt("a sign", "ocr", {"target": asked})])
        assert (scores.value.item(), scores.parts["exact"].item()) == (1, 1)


@pytest.mark.parametrize(("found", "target"), [("cafe", "café"), ("0pen", "open"), ("ratón", "raton"), ("1,5", "1.5")])
def test_what_a_reader_tells_apart_is_not_the_same(written, found, target):
    written((found,))
    assert OCR().score(blank(), [asking(target)]).item() == pytest.approx(1 - 1 / len(target))


def test_ascii_is_compared_as_published():
    text = "".join(map(chr, range(128)))
    assert letters(text) == text.replace(" ", "").lower()


@pytest.mark.parametrize("target", [None, ["open"], 2024, {"text": "open"}, True], ids=repr)
def test_a_target_that_is_no_text_is_refused(target):
    with pytest.raises(ValueError, match=r"target of prompt 'a sign' is .*; expected a text, or no 'target' at all"):
        OCR().score(blank(), [Prompt("a sign", "ocr", {"target": target})])


@pytest.mark.parametrize(
    ("found", "target", "value", "exact", "no_substring"),
    [
        (("GRAND", "opening"), "Grand Opening", 1, 1, 1),
        (("grand opening today",), "grand opening", 1, 0, 1 - 5 / 12),
        (("grand", "openin"), "grand opening", 1 - 1 / 12, 0, 1 - 1 / 12),
        (("neagrp gnidnrg",), "ab", 0, 0, 0),  # never below zero
        (("spam " * 20 + "sale" + " spam" * 20,), "sale", 1, 0, 0),  # the bonus can be earned by writing much
        (None, "nothing is there", 0, 0, 0),
        (("CAFÉ ½",), "café ½", 1, 1, 1),
        (("a\tb",), "a b", 1 - 1 / 2, 0, 1 - 1 / 2),  # of all blanks only the space is left out
    ],
)
def test_the_rule_is_that_of_the_paper(written, found, target, value, exact, no_substring):
    written(found)
    scores = OCR().detail(blank(), [asking(target)])
    assert scores.value.tolist() == pytest.approx([value])
    assert scores.parts["exact"].tolist() == [exact]
    assert scores.parts["no_substring"].tolist() == pytest.approx([no_substring])


def test_closeness_is_the_capped_edit_distance():
    dice = random.Random(0)
    pairs = [("".join(dice.choices("abc", k=dice.randint(0, 9))), "abcabc"[: dice.randint(1, 6)]) for _ in range(60)]
    expected = [1 - min(edits(text, target), len(target)) / len(target) for text, target in pairs]
    assert closeness(*zip(*pairs, strict=True)).tolist() == pytest.approx(expected)
    assert closeness([], []).shape == (0,)


@cache
def edits(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_the_target_is_named_or_quoted(written):
    written(*[("one",)] * 5)
    prompts = [
        Prompt('"one" beside "two"', "ocr"),
        Prompt('a sign, "two"', "ocr", {"target": "One"}),
        Prompt("no quotes", "ocr", {"target": "one"}),
        Prompt("a sign, “one”, and “two”", "ocr"),
        Prompt('“two” above "one"', "ocr"),  # straight quotes are the published rule
    ]
    assert OCR().detail(blank(5), prompts).parts["exact"].tolist() == [1] * 5


@pytest.mark.parametrize("text", ["a dog", 'a sign that says ""', 'a sign that says " "', 'an open "quote'])
def test_a_prompt_without_a_target_is_named(text):
    with pytest.raises(ValueError, match="asks for no text; write it in double quotes") as error:
        OCR().score(blank(), [Prompt(text, "ocr")])
    assert repr(text) in str(error.value)


def test_a_failure_of_the_engine_is_nan_and_said(written, caplog):
    written(("yes",), RuntimeError("out of luck"), ("no",))
    scores = OCR().detail(blank(3), [asking("yes")] * 3)
    for scored in (scores.value, *scores.parts.values()):
        assert scored.isnan().tolist() == [False, True, False]
    assert "OCR failed on an image: RuntimeError: out of luck" in caplog.text


def test_the_engine_sees_blue_green_red(monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, "_engine", lambda: lambda image: seen.append(image) or SimpleNamespace(txts=None))
    OCR().score(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6), [asking("x")])
    assert seen[0].shape == (4, 6, 3)
    assert seen[0][0, 0].tolist() == [0, 128, 255]
    assert seen[0].flags.c_contiguous


def test_rendered_texts_are_read():
    """At least 95 % of 72 exactly: plain, coloured and rotated, noisy."""
    prompts = OCRPrompts("test").draw(24, seed=0)
    scores = [OCR().detail(rendered(style, prompts), prompts) for style in STYLES]
    assert torch.cat([score.parts["exact"] for score in scores]).mean() >= 0.95
    for score in scores:
        assert score.value.shape == (24,)
        assert score.value.dtype == torch.float32
        assert (score.value >= score.parts["no_substring"]).all()
        assert (score.parts["no_substring"] >= score.parts["exact"]).all()


def test_a_wrong_or_empty_picture_earns_little():
    prompts = [asking("Midnight Library"), asking("Harbor")]
    images = torch.cat(
        [rendered("plain", OCRPrompts("test").draw(1, seed=5)), blank(1).new_full((1, 3, 512, 512), 255)]
    )
    wrong, empty = OCR().score(images.float() / 255, prompts).tolist()
    assert wrong < 0.5
    assert empty == 0


def test_workers_change_no_number_and_a_dead_one_costs_its_batch_only(caplog):
    prompts = OCRPrompts("test").draw(5, seed=1)
    images = torch.cat([rendered("plain", prompts[:3]), rendered("noisy", prompts[3:])])
    reward = OCR(workers=2)
    alone, together = OCR().detail(images, prompts), reward.detail(images, prompts)
    assert torch.equal(alone.value, together.value)
    assert all(torch.equal(alone.parts[name], together.parts[name]) for name in alone.parts)
    reward._started().submit(os._exit, 1)
    assert reward.score(images[:2], prompts[:2]).isnan().all()
    assert "an OCR worker died" in caplog.text
    assert reward._pool is None  # the next batch starts others
    reward.close()


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="workers is -1; expected at least 0"):
        OCR(workers=-1)
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\), got \(3, 8, 8\)"):
        OCR().score(torch.zeros(3, 8, 8), [asking("x")] * 3)
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs rapidocr and onnxruntime; pip install "flowopd\[ocr\]"'):
        OCR()


def test_a_config_may_name_it():
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    config = parser.parse_args(["--reward", "flowopd.rewards.OCR"])
    assert isinstance(parser.instantiate_classes(config).reward, DetailedReward)
