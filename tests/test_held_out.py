"""The laws of what is held out: no run trains on it, whatever the source and the seed."""

import pytest
import tiny

from flowopd.prompts import GenEvalPrompts, OCRPrompts, PromptFile, PromptSource
from flowopd.prompts.geneval import picture
from flowopd.prompts.ocr import letters
from flowopd.prompts.splits import Divisible, held_out
from flowopd.records import Prompt
from flowopd.tiles import TilesPrompts
from flowopd.training import RolloutDataModule

SOURCES = ["composition", "text", "geneval", "ocr", "many", "few", "words"]


def texts(path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, PromptSource]:
    """Every source of the project."""
    folder, lines = tmp_path_factory.mktemp("texts"), [f"picture {number}" for number in range(40)]
    return {
        "composition": TilesPrompts("composition"),
        "text": TilesPrompts("text"),
        "geneval": GenEvalPrompts(),
        "ocr": OCRPrompts(),
        "many": PromptFile(texts(folder / "many.txt", *lines * 2), "many"),
        "few": PromptFile(texts(folder / "few.txt", *lines[:2]), "few"),
        "words": tiny.Words("words"),
    }


def asked(prompt: Prompt) -> str:
    """What a prompt asks to see, in whatever words."""
    if "include" in prompt.metadata:
        return repr(picture(prompt))
    if "clauses" in prompt.metadata:
        return repr(sorted(prompt.metadata["clauses"]))
    return letters(prompt.metadata["target"]) if "target" in prompt.metadata else prompt.text


@pytest.mark.parametrize("name", SOURCES)
def test_no_run_trains_on_what_it_holds_out(name, sources):
    """With ``evaluation_prompts`` left out: many iterations of two seeds."""
    data = RolloutDataModule({name: sources[name]}, evaluation_count=256)
    evaluated = {asked(prompt) for prompt in data.held_out()}
    for seed in (0, 1):
        drawn = {asked(prompt) for iteration in range(40) for prompt in data.mixture.draw(16, iteration, seed)}
        assert drawn
        assert not evaluated & drawn
    assert len(data.held_out()) == 256
    assert data.held_out() == data.held_out()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_two_halves(name, sources):
    assert isinstance(sources[name], Divisible)
    train, test = ({asked(p) for p in half.draw(400, seed=3)} for half in sources[name].divided())
    assert not train & test


@pytest.mark.parametrize("kind", [lambda split: TilesPrompts("text", split), GenEvalPrompts, OCRPrompts])
def test_a_split_holds_out_the_other_one(kind):
    for split, other in (("train", "test"), ("test", "train")):
        halves = kind(split).divided()
        assert [half.split for half in halves] == [split, other]
        assert halves[0].draw(8, 5) == kind(split).draw(8, 5)


def test_a_file_holds_out_a_tenth_of_its_texts_one_at_least(sources, tmp_path):
    def sizes(name):
        return [len({p.text for p in half.draw(200, seed=0)}) for half in sources[name].divided()]

    assert sizes("many") == [36, 4]
    assert sizes("few") == [1, 1]
    with pytest.raises(ValueError, match=r"p.txt' has one text, none to hold out; give evaluation_prompts too"):
        PromptFile(texts(tmp_path / "p.txt", "a dog", "a dog"), "draw").divided()


class Undivided:
    """A user's source: it draws, and knows nothing of halves."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        return [Prompt(f"{seed} {row}", "mine") for row in range(count)]


@pytest.mark.parametrize("given", [None, {"mine": Undivided()}], ids=["left out", "given"])
def test_a_source_without_halves_is_evaluated_by_a_seed_that_no_training_draw_has(given):
    data = RolloutDataModule({"mine": Undivided()}, evaluation_prompts=given, evaluation_count=4)
    evaluated = {prompt.text for prompt in data.held_out()}
    for seed in range(3):
        assert not evaluated & {p.text for iteration in range(300) for p in data.mixture.draw(16, iteration, seed)}


def test_prompts_to_evaluate_with_are_taken_as_they_are_given(sources):
    data = RolloutDataModule({"many": sources["many"]}, evaluation_prompts={"many": sources["many"]})
    assert len({prompt.text for prompt in data.held_out()}) == 40
    assert data.held_out() == held_out(sources["many"], 256)


@pytest.mark.parametrize("name", SOURCES[:-1])
@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (4, -1), (2.5, 0), (4, 0.5), (True, 0)])
def test_a_draw_that_cannot_be_is_refused(name, count, seed, sources):
    """A seed of -1 would be the seed 1 to Python, and an error to numpy."""
    with pytest.raises(ValueError, match=r"(count|seed) is .*; expected "):
        sources[name].draw(count, seed)
