"""The laws of prompts from data sets: a column is the text, the others are metadata that rewards read."""

import json
import sys

import pytest
import torch

from flowopd.prompts import PromptDataset
from flowopd.prompts.splits import divided
from flowopd.records import Prompt
from flowopd.rewards.scorer import Scorer

datasets = pytest.importorskip("datasets")
ROWS = [{"caption": f"{n} cats", "count": n, "tags": ["pet"], "box": {"x": 0.5}, "text": "other"} for n in range(1, 21)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path) -> str:
    """A data set as a folder of JSON lines."""
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "pets")


def test_a_column_is_the_text_and_the_others_are_metadata(folder):
    source = PromptDataset(folder, "caption", "train", "pets")
    assert source.prompts[0] == Prompt("1 cats", "pets", {"count": 1, "tags": ["pet"], "box": {"x": 0.5}})
    assert len(source.prompts) == 20
    assert len(PromptDataset(folder, "caption", "train[:5]", "pets").prompts) == 5


def test_parquet_reads_alike_and_pictures_are_left_out(folder, tmp_path):
    rows = datasets.load_dataset(folder, split="train")
    pictures = datasets.Features({"image": datasets.Image(), "raw": datasets.Value("binary")})
    seen = datasets.Dataset.from_dict({"image": [None] * 20, "raw": [b"x"] * 20}, features=pictures)
    (tmp_path / "parquet").mkdir()
    datasets.concatenate_datasets([rows, seen], axis=1).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    ours = PromptDataset(str(tmp_path / "parquet"), "caption", "train", "pets").prompts
    assert ours == PromptDataset(folder, "caption", "train", "pets").prompts


def test_a_reward_reads_the_metadata(folder):
    class Counts:
        def score(self, images, prompts):
            return torch.tensor([float(prompt.metadata["count"]) for prompt in prompts])

    prompts = PromptDataset(folder, "caption", "train", "pets").prompts[:3]
    assert Scorer("count", Counts()).detail(torch.zeros(3, 3, 4, 4), prompts).value.tolist() == [1, 2, 3]


def test_draws_are_seeded_and_held_out_texts_are_not_trained_on(folder):
    source = PromptDataset(folder, "caption", "train", "pets", trigger="sks")
    assert source.draw(7, seed=3) == source.draw(7, seed=3)
    trained, kept = (sources["pets"] for sources in divided({"pets": source}))
    texts = [{prompt.text for prompt in half.draw(40, seed=0)} for half in (trained, kept)]
    assert (len(texts[0]), len(texts[1])) == (18, 2)
    assert not texts[0] & texts[1]
    assert all(text.startswith("sks ") for half in texts for text in half)


def test_what_is_no_data_set_split_column_or_prompt_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'prompt'; it has 'caption', 'count'"):
        PromptDataset(folder, "prompt", "train", "pets")
    with pytest.raises(ValueError, match=r"data set '.*pets' cannot be read, split 'dev': .*dev"):
        PromptDataset(folder, "caption", "dev", "pets")
    with pytest.raises(ValueError, match=r"data set '.*none' cannot be read, split 'train'"):
        PromptDataset(str(tmp_path / "none"), "caption", "train", "pets")
    with pytest.raises(
        ValueError, match=r"row 0 of split 'train' of data set .* is not a prompt of task 'pets': text is 1;"
    ):
        PromptDataset(folder, "count", "train", "pets")
    with pytest.raises(ValueError, match=r"row 4 of .* is not a prompt of task 'pets': no fives"):
        PromptDataset(folder, "caption", "train", "pets", parse=no_fives)


def no_fives(text: str) -> Prompt:
    if text.startswith("5"):
        raise ValueError("no fives")
    return Prompt(text, "any")


def test_without_the_package_a_sentence_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "flowopd\[datasets\]"'):
        PromptDataset(folder, "caption", "train", "pets")
