"""The laws of encoded prompts: read once, released, found again on disk, bounded, and never another model's."""

import errno
import gc
import hashlib
import multiprocessing
import os
import shutil
import time
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import loaded

from flowopd.models import files as files_module
from flowopd.models.files import ModelFiles
from flowopd.models.textcache import MANIFEST, TextFolder, TextKey, TextMemory
from flowopd.models.texts import TextEncoders
from flowopd.records import Conditioning

TEXTS = ["red 1", "blue 22", "red 1", 'text "Größe"']


@pytest.fixture
def reads(monkeypatch):
    """Every time that text encoders are read from disk, the first of them; it may die."""
    seen, read = [], StableDiffusion3Pipeline.from_pretrained

    def counting(*args, **options):
        pipeline = read(*args, **options)
        seen.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", counting)
    return seen


@pytest.fixture(scope="module")
def encoded(tiny_pipeline):
    return loaded(tiny_pipeline).encode(TEXTS)


@pytest.fixture(scope="module")
def second_pipeline(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("pipelines") / "second")
    tiny.pipeline(seed=1).save_pretrained(folder)
    return folder


def assert_equal(first: Conditioning, second: Conditioning):
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, second.pooled)


def row(value: float = 0.0) -> Conditioning:
    """Eighty bytes."""
    return Conditioning(torch.full((1, 4, 4), value), torch.full((1, 4), value))


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors*")}


# -------------------------------------------------------------------------------------------------------- what is read


def test_nothing_but_the_transformer_is_read_before_it_is_needed(tiny_pipeline, reads):
    backbone = loaded(tiny_pipeline)
    assert backbone.latent_shape() == (4, 8, 8)
    cond = Conditioning(torch.zeros(1, 3, 32), torch.zeros(1, 32))
    backbone.velocity(torch.zeros(1, 4, 8, 8), torch.ones(1), cond)
    assert not reads
    assert "autoencoder" not in vars(backbone)
    backbone.decode(torch.zeros(1, 4, 8, 8))
    assert not reads


@pytest.mark.parametrize("keep", [False, True])
def test_text_encoders_are_released_when_nothing_is_missing(tiny_pipeline, encoded, reads, keep):
    backbone = loaded(tiny_pipeline, keep_encoders=keep)
    assert_equal(backbone.encode(TEXTS), encoded)
    gc.collect()
    assert backbone.texts.loaded == keep
    assert [encoder() is None for encoder in reads] == [not keep]
    backbone.encode(TEXTS)
    assert len(reads) == 1
    backbone.encode(["new"])
    assert len(reads) == (1 if keep else 2)


def test_prepared_texts_read_the_encoders_once(tiny_pipeline, encoded, reads):
    backbone = loaded(tiny_pipeline, keep_encoders=False)
    backbone.prepare([*TEXTS, "", *map(str, range(20))])
    for text, expected in zip(TEXTS, range(len(TEXTS)), strict=True):
        assert_equal(backbone.encode([text]), encoded[expected : expected + 1])
    backbone.prepare(TEXTS)
    assert len(reads) == 1


def test_small_encoders_stay_unless_told_otherwise(tiny_pipeline, reads):
    backbone = loaded(tiny_pipeline)
    backbone.encode(["a"])
    assert backbone.texts.loaded
    backbone.encode(["b"])
    assert len(reads) == 1


def test_the_stock_pipeline_is_there_for_notebooks(tiny_pipeline, reads):
    backbone = loaded(tiny_pipeline, keep_encoders=False)
    pipe = backbone.pipeline
    assert pipe.transformer is backbone.network
    pipe.set_progress_bar_config(disable=True)
    images = pipe("red 1", num_inference_steps=2, max_sequence_length=8, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    backbone.encode(["a"])
    backbone.encode(["b"])
    assert len(reads) == 1
    assert backbone.texts.parts()["text_encoder"] is pipe.text_encoder


def test_a_model_s_texts_are_two_functions():
    """What a further family of models has to say of its texts: how encoders are read, and how they encode."""
    seen = []

    def lengths(parts, texts):
        seen.append(list(texts))
        sizes = torch.tensor([float(len(text)) for text in texts])
        return Conditioning(parts["scale"] * sizes[:, None, None], sizes[:, None])

    texts = TextEncoders(lambda: {"scale": 2.0}, lengths, TextMemory(limit=10**6), keep=False)
    texts.prepare(["a", "bb"])
    assert texts.encode(["bb", "a", "bb"]).tokens.flatten().tolist() == [4, 2, 4]
    assert seen == [["a", "bb", *[""] * 6]]
    assert not texts.loaded


# ------------------------------------------------------------------------------------------------------------- on disk


def test_a_second_run_reads_no_text_encoder(tiny_pipeline, tmp_path, encoded, reads):
    first = loaded(tiny_pipeline, text_cache=str(tmp_path / "cache"))
    first.prepare(TEXTS)
    assert_equal(first.encode(TEXTS), encoded)
    assert len(reads) == 1
    second = loaded(tiny_pipeline, text_cache=str(tmp_path / "cache"))
    second.prepare(TEXTS)
    assert_equal(second.encode(TEXTS), encoded)
    assert len(reads) == 1


def test_a_text_is_one_file_that_says_what_it_is(tiny_pipeline, tmp_path, encoded):
    loaded(tiny_pipeline, text_cache=str(tmp_path)).encode(TEXTS * 3)
    assert len(files(tmp_path)) == 3
    texts = set()
    for name in files(tmp_path):
        with safe_open(tmp_path / name, "pt") as content:
            texts.add(content.metadata()["text"])
            assert set(content.keys()) == {"tokens", "pooled"}
    assert texts == set(TEXTS)


def test_encodings_keep_their_precision(tiny_pipeline, tmp_path):
    options = {"dtype": "bfloat16", "text_cache": str(tmp_path)}
    first, second = loaded(tiny_pipeline, **options).encode(TEXTS), loaded(tiny_pipeline, **options).encode(TEXTS)
    assert first.tokens.dtype == second.tokens.dtype == torch.bfloat16
    assert_equal(first, second)


def test_lengths_and_precisions_share_a_folder_and_are_not_mixed(tiny_pipeline, tmp_path):
    for options in ({}, {"max_sequence_length": 5}, {"dtype": "bfloat16"}, {"max_sequence_length": 0}):
        plain = loaded(tiny_pipeline, **options).encode(TEXTS[:2])
        assert_equal(loaded(tiny_pipeline, text_cache=str(tmp_path), **options).encode(TEXTS[:2]), plain)
        again = loaded(tiny_pipeline, text_cache=str(tmp_path), **options)
        assert_equal(again.encode(TEXTS[:2]), plain)
    assert len(files(tmp_path)) == 8


def test_a_cache_of_another_model_is_refused(tiny_pipeline, second_pipeline, tmp_path):
    loaded(tiny_pipeline, text_cache=str(tmp_path)).encode(["a"])
    with pytest.raises(ValueError, match=r"text cache '.*' holds the encodings of \w+, but this model is \w+; give"):
        loaded(second_pipeline, text_cache=str(tmp_path))


def test_a_cache_without_its_manifest_is_still_no_other_model_s(tiny_pipeline, second_pipeline, tmp_path):
    loaded(tiny_pipeline, text_cache=str(tmp_path)).encode(TEXTS)
    (tmp_path / MANIFEST).unlink()
    theirs = loaded(second_pipeline, text_cache=str(tmp_path)).encode(TEXTS)
    assert_equal(theirs, loaded(second_pipeline).encode(TEXTS))


def test_a_changed_text_encoder_is_another_model_and_a_changed_transformer_is_not(tiny_pipeline, tmp_path):
    pipeline, cache = shutil.copytree(tiny_pipeline, tmp_path / "model"), str(tmp_path / "cache")
    loaded(str(pipeline), text_cache=cache)
    alter(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.bias")
    loaded(str(pipeline), text_cache=cache)
    alter(pipeline / "text_encoder_3" / "model.safetensors", "shared.weight")
    with pytest.raises(ValueError, match="holds the encodings of"):
        loaded(str(pipeline), text_cache=cache)


def alter(file: Path, key: str):
    tensors = load_file(file)
    tensors[key] = tensors[key] + 1
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another text's"])
def test_a_broken_file_is_made_anew(tiny_pipeline, tmp_path, encoded, reads, damage):
    loaded(tiny_pipeline, text_cache=str(tmp_path)).encode(TEXTS)
    whole = {name: (tmp_path / name).read_bytes() for name in sorted(files(tmp_path))}
    (first, content), (_, other), *_ = whole.items()
    broken = {"truncated": content[:-40], "empty": b"", "garbage": b"x" * 99, "another text's": other}
    (tmp_path / first).write_bytes(broken[damage])
    assert_equal(loaded(tiny_pipeline, text_cache=str(tmp_path)).encode(TEXTS), encoded)
    assert len(reads) == 2
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_a_file_in_the_place_of_the_folder_is_named(tiny_pipeline, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=r"text cache '.*cache' cannot be used: .*exists"):
        loaded(tiny_pipeline, text_cache=str(tmp_path / "cache"))


def test_a_full_disk_is_told_once_and_costs_no_encoding(tiny_pipeline, tmp_path, encoded, monkeypatch):
    backbone = loaded(tiny_pipeline, text_cache=str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="text cache .* cannot be written to: .*No space left on device") as told:
        assert_equal(backbone.encode(TEXTS), encoded)
    assert len(told) == 1
    assert not files(tmp_path)


def full(path, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -------------------------------------------------------------------------------------------------------------- bounds


def test_memory_keeps_what_was_used_last():
    memory = TextMemory(limit=3 * 80)
    for text in "abc":
        memory.put(text, row())
    memory.get("a")
    memory.put("d", row())
    assert [text in memory for text in "abcd"] == [True, False, True, True]
    assert memory.size == 3 * 80


def test_a_row_larger_than_memory_is_kept_alone():
    memory = TextMemory(limit=10)
    memory.put("a", row())
    memory.put("b", row())
    assert ["a" in memory, "b" in memory] == [False, True]


def test_memory_too_small_for_a_batch_changes_no_encoding(tiny_pipeline, encoded):
    backbone = loaded(tiny_pipeline, text_memory_gb=1e-9)
    for _ in range(2):
        assert_equal(backbone.encode(TEXTS), encoded)


def test_the_padding_of_a_batch_takes_no_memory(tiny_pipeline):
    backbone = loaded(tiny_pipeline)
    backbone.encode(["a"])
    kept = backbone.texts.memory.get("a")
    assert kept.tokens.untyped_storage().nbytes() == kept.tokens.nbytes


def disk(folder: Path, limit: int = 10**9) -> TextFolder:
    return TextFolder(folder, TextKey("model", 8, "float32"), limit)


def test_the_folder_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path):
    disk(tmp_path).put("probe", row())
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    store = disk(tmp_path, limit=10 * size)
    for i in range(40):
        store.put(f"{i:05d}", row(i))
        assert store.get("probe") is not None
        assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) <= 10 * size
    assert torch.equal(store.get("probe").tokens, row().tokens)
    assert store.get("00039") is not None
    assert store.get("00000") is None


# ------------------------------------------------------------------------------------------------- several processes


def test_ranks_that_write_the_same_texts_at_once_leave_whole_files(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=busy, args=(tmp_path, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=60) for _ in ranks] == [0, 0, 0, 0]
    for rank in ranks:
        rank.join()
    assert len(files(tmp_path)) == 5


def busy(folder: Path, results):
    """Write and read five texts again and again; how often something else came back than was written."""
    store, wrong = disk(folder), 0
    for _ in range(30):
        for i in range(5):
            store.put(str(i), row(i))
            found = store.get(str(i))
            wrong += found is None or not torch.equal(found.tokens, row(i).tokens)
    results.put(wrong)


# ------------------------------------------------------------------------------------------------------------- identity


@pytest.fixture
def model(tmp_path):
    """A model of one part, whose file is too large to be read at every start."""
    part = tmp_path / "model" / "part"
    part.mkdir(parents=True)
    (part / "weights.safetensors").write_bytes(bytes(6_000_000))
    (part / "config.json").write_text("{}")
    return ModelFiles(str(tmp_path / "model"))


@pytest.mark.parametrize("place", [0, 1, 65_537, 70_000, 3_141_592, 5_999_999])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "remembered"])
def test_any_changed_byte_is_another_model(model, tmp_path, place, later, monkeypatch):
    """Also where the file keeps its length and its time."""
    if later:
        now = time.time_ns() + 10**10
        monkeypatch.setattr(files_module.time, "time_ns", lambda: now)
    remembered, file = tmp_path / "cache" / "digests.json", tmp_path / "model" / "part" / "weights.safetensors"
    before, kept = model.identity(["part"], remembered), file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"x")
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert model.identity(["part"], remembered) != before
    assert model.identity(["part"], remembered) == model.identity(["part"])


def test_a_file_that_did_not_change_is_read_once(model, tmp_path, monkeypatch):
    read, own = [], hashlib.file_digest
    now = time.time_ns() + 10**10
    monkeypatch.setattr(files_module.time, "time_ns", lambda: now)
    monkeypatch.setattr(files_module.hashlib, "file_digest", lambda stream, kind: read.append(1) or own(stream, kind))
    found = {model.identity(["part"], tmp_path / "cache" / "digests.json") for _ in range(3)}
    assert (len(found), len(read)) == (1, 2)


def test_a_copied_model_is_the_same_model(model, tmp_path):
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    assert ModelFiles(str(tmp_path / "copy")).identity(["part"]) == model.identity(["part"])


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_digests_that_cannot_be_read_are_made_anew(model, tmp_path, content):
    (tmp_path / "digests.json").write_text(content)
    assert model.identity(["part"], tmp_path / "digests.json") == model.identity(["part"])
    assert model.identity(["part"], tmp_path / "digests.json" / "no folder") == model.identity(["part"])
