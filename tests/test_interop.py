"""The laws of exchange: what others publish loads here, what is written here loads there, refusals are sentences."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from threading import Thread

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import loaded
from transformers import CLIPModel

from flowopd.models import AdapterSource, LoRASpec, Merge, SD3Backbone
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.models.adapters.files import CONFIG, DIFFUSERS_WEIGHTS, read_adapter
from flowopd.models.adapters.lora import Adapter, adapter_parameters, add_adapter, take_adapter
from flowopd.rewards.model import read_pretrained, weights_file
from flowopd.rollouts import Sampler
from flowopd.teachers import FullTeacher, LoRATeacher
from flowopd.training import AdapterExport, OPDStudent, TeacherCallback

TEXTS = ["red 1", "blue 22"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def backbone(tiny_pipeline):
    return loaded(tiny_pipeline)


@pytest.fixture
def state(backbone):
    return torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.3]), backbone.encode(TEXTS)


@pytest.fixture(scope="module")
def second_pipeline(tmp_path_factory):
    """Another model of the same shape."""
    folder = str(tmp_path_factory.mktemp("pipelines") / "second")
    tiny.pipeline(seed=1).save_pretrained(folder)
    return folder


def stock_velocity(transformer, state):
    x, sigma, cond = state
    with torch.no_grad():
        return transformer.eval()(x, cond.tokens, cond.pooled, 1000 * sigma, return_dict=False)[0]


def student(backbone: SD3Backbone, **spec) -> Adapter:
    """A random adapter "student" on the backbone."""
    add_adapter(backbone.network, "student", LoRASpec(**({"rank": 3, "alpha": 7} | spec)))
    with torch.no_grad():
        for parameter in adapter_parameters(backbone.network, "student"):
            parameter.normal_(std=0.1)
    return take_adapter(backbone.network, "student")


def card(base: str = "org/base", **options) -> ModelCard:
    return ModelCard(base, "OPDStudent", **options)


# ------------------------------------------------------------------------------------------------- models of the hub


def test_a_model_of_the_hub_is_its_folder(tiny_pipeline, cache, state):
    tiny.publish(tiny_pipeline, cache, "org/sd3")
    ours = loaded("org/sd3")
    assert torch.equal(ours.velocity(*state), loaded(tiny_pipeline).velocity(*state))
    assert torch.equal(ours.encode(TEXTS).tokens, state[2].tokens)
    assert ours.decode(state[0]).shape == (2, 3, 16, 16)


def test_a_revision_is_a_branch_a_tag_or_a_commit(tiny_pipeline, second_pipeline, cache, state):
    tiny.publish(tiny_pipeline, cache, "org/sd3", commit="a" * 40)
    tiny.publish(second_pipeline, cache, "org/sd3", "v2", commit="b" * 40)
    first, second = (loaded(path).velocity(*state) for path in (tiny_pipeline, second_pipeline))
    for revision, expected in ((None, first), ("main", first), ("v2", second), ("b" * 40, second)):
        assert torch.equal(loaded("org/sd3", revision=revision).velocity(*state), expected)


def test_a_transformer_in_several_files_is_read_whole(tiny_pipeline, cache, state):
    folder = tiny.publish(tiny_pipeline, cache, "org/large")
    shutil.rmtree(folder / "transformer")
    tiny.stock_transformer(tiny_pipeline).save_pretrained(folder / "transformer", max_shard_size="30KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(loaded("org/large").velocity(*state), loaded(tiny_pipeline).velocity(*state))


def test_with_a_text_cache_the_text_encoders_need_not_even_be_there(tiny_pipeline, cache, tmp_path):
    folder = tiny.publish(tiny_pipeline, cache, "org/sd3")
    first = loaded("org/sd3", text_cache=str(tmp_path / "texts")).encode(TEXTS)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(folder / part)
    second = loaded("org/sd3", text_cache=str(tmp_path / "texts")).encode(TEXTS)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, second.pooled)


def test_another_commit_has_another_text_cache(tiny_pipeline, cache, tmp_path):
    tiny.publish(tiny_pipeline, cache, "org/sd3", commit="a" * 40)
    tiny.publish(tiny_pipeline, cache, "org/sd3", "v2", commit="b" * 40)
    loaded("org/sd3", text_cache=str(tmp_path / "texts"))
    with pytest.raises(ValueError, match=f"holds the encodings of org/sd3@{'a' * 40}, but this model is .*{'b' * 40}"):
        loaded("org/sd3", revision="v2", text_cache=str(tmp_path / "texts"))


# --------------------------------------------------------------------------------------------- refusals in one sentence

ANSWERS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "missing": (404, "RepoNotFound")}
ANSWERS |= {"tags": (404, "RevisionNotFound"), "down": (500, "")}


class Hub(BaseHTTPRequestHandler):
    """Answers every question about a model by the model's name."""

    def do_GET(self):
        status, code = ANSWERS.get(self.path.partition("/org/")[2].split("/")[0], (404, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Be quiet."""


@pytest.fixture
def online(cache, monkeypatch) -> Iterator[None]:
    """The hub is a server of our own."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()
    server.server_close()


SENTENCES = {
    "gated": r"'org/gated' is gated: accept its terms at https://huggingface.co/org/gated, then log in",
    "private": r"'org/private' is neither a folder nor a model that the hub shows us; check the name, or log in",
    "missing": r"'org/missing' is neither a folder nor a model that the hub shows us; check the name, or log in",
    "tags": r"'org/tags' of the hub has no revision 'v9'",
    "down": r"'org/down' is not a folder, the hub cannot be reached, and its cache does not hold all of it; run once",
}


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_hub_s_refusals_are_sentences(online, name, kind):
    read = {
        "model": lambda *args: loaded(args[0], revision=args[1]),
        "adapter": lambda *args: read_adapter(args[0], None, args[1]),
    }
    with pytest.raises(FileNotFoundError, match=f"^{kind} {SENTENCES[name]}"):
        read[kind](f"org/{name}", "v9")


@pytest.mark.parametrize("name", ["gated", "private", "missing", "tags"])
def test_the_hub_s_refusals_to_a_reward_are_the_same_sentences_and_say_where_to_get_it(online, name):
    with pytest.raises(FileNotFoundError, match=f"^model {SENTENCES[name]}.*; get it there$"):
        weights_file(f"org/{name}", "config.json", "v9", "get it there")
    with pytest.raises(FileNotFoundError, match=f"^model {SENTENCES[name]}.*; get it there$"):
        read_pretrained(CLIPModel, f"org/{name}", "get it there", revision="v9")


@pytest.mark.parametrize("path", ["org/never-seen", "runs/typo"])
def test_an_unreachable_hub_is_a_sentence(cache, path):
    with pytest.raises(
        FileNotFoundError, match=f"^model '{path}' is not a folder, the hub cannot be reached.*; get it"
    ):
        weights_file(path, "config.json", None, "get it there")
    with pytest.raises(FileNotFoundError, match=f"^model '{path}' is not a folder, the hub cannot be reached"):
        loaded(path)
    with pytest.raises(FileNotFoundError, match=f"^adapter '{path}' is not a folder, the hub cannot be reached"):
        read_adapter(path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3", "tokenizer"])
def test_a_missing_part_is_named(tiny_pipeline, tmp_path, part):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"model '.*' has no {part}; expected a StableDiffusion3Pipeline"):
        use(str(folder))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_corrupt_file_is_named(tiny_pipeline, tmp_path, part, damage):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{part}/{file.name} is not a readable safetensors file .*download it again"):
        use(str(folder))


def use(path: str):
    ours = loaded(path)
    ours.encode(["a"])
    ours.decode(torch.zeros(1, 4, 8, 8))


def test_a_transformer_that_lacks_a_tensor_is_refused(tiny_pipeline, tmp_path):
    """diffusers would go on with a random one."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != "proj_out.bias"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"transformer .* lacks proj_out.bias; copy or download it again"):
        loaded(str(folder))
    save_file(tensors | {"proj_out.scale": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"transformer .* has, besides what belongs to it, proj_out.scale"):
        loaded(str(folder))


def test_another_kind_of_pipeline_is_refused(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a FluxPipeline; expected a StableDiffusion3Pipeline"):
        loaded(str(folder))


# ------------------------------------------------------------------------------------------------------------ teachers


@pytest.mark.parametrize("subfolder", [None, "OCRTeacher/lora"])
def test_a_teacher_loads_as_it_was_published(backbone, state, tiny_pipeline, cache, tmp_path, subfolder):
    for commit, revision, seed in (("a" * 40, "main", 1), ("b" * 40, "v2", 2)):
        tiny.expert(tmp_path / revision / (subfolder or ""), tiny_pipeline, seed=seed, rank=5)
        tiny.publish(tmp_path / revision, cache, "org/teacher", revision, commit)
    for revision, seen in ((None, "main"), ("v2", "v2"), ("b" * 40, "v2")):
        teacher = LoRATeacher("org/teacher", subfolder, revision, guidance_scale=2.0)
        teacher.attach(backbone)
        folder = str(tmp_path / seen / (subfolder or ""))
        theirs = PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), folder)
        x, sigma, _ = state
        guided = 2 * stock_velocity(theirs, state) - stock_velocity(theirs, (x, sigma, backbone.encode(["", ""])))
        torch.testing.assert_close(teacher.velocity(*state), guided, rtol=0, atol=1e-5)


def test_a_merge_reads_subfolders_and_revisions(tiny_pipeline, cache, tmp_path):
    for seed, name in enumerate(("AesTeacher", "OCRTeacher")):
        tiny.expert(tmp_path / "repo" / name / "lora", tiny_pipeline, seed=seed)
    tiny.publish(tmp_path / "repo", cache, "org/teachers", "v1")
    sources = [AdapterSource("org/teachers", f"{name}/lora", "v1") for name in ("AesTeacher", "OCRTeacher")]
    folders = [str(tmp_path / "repo" / name / "lora") for name in ("AesTeacher", "OCRTeacher")]
    assert Merge(sources).adapter().fingerprint() == Merge(folders).adapter().fingerprint()


def test_a_forgotten_subfolder_is_named(tiny_pipeline, tmp_path):
    tiny.expert(tmp_path / "OCRTeacher" / "lora", tiny_pipeline)
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}; .* there is one in subfolder 'OCRTeacher/lora'$"):
        read_adapter(str(tmp_path))


def test_another_peft_method_is_refused(tiny_pipeline, tmp_path):
    tiny.expert(tmp_path, tiny_pipeline)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "IA3", "target_modules": ["attn.to_q"]}))
    with pytest.raises(ValueError, match="is of peft's type IA3, not LORA"):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize("alone", [False, True], ids=["pipeline", "transformer alone"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_fine_tuned_transformer_is_a_teacher(backbone, state, second_pipeline, tmp_path, alone, scale):
    theirs = tiny.stock_transformer(second_pipeline)
    theirs.save_pretrained(tmp_path)
    second = tiny.backbone(str(tmp_path) if alone else second_pipeline)
    teacher = FullTeacher(second, guidance_scale=scale, device="cpu")
    teacher.attach(backbone)
    x, sigma, _ = state
    negative = stock_velocity(theirs, (x, sigma, backbone.encode(["", ""])))
    expected = negative + scale * (stock_velocity(theirs, state) - negative)
    torch.testing.assert_close(teacher.velocity(*state), expected, rtol=0, atol=1e-5)
    assert not second.texts.loaded
    assert "autoencoder" not in vars(second)


def test_a_teacher_in_another_precision_reads_our_texts(backbone, state, second_pipeline):
    teacher = FullTeacher(tiny.backbone(second_pipeline, dtype="bfloat16"), guidance_scale=2.0)
    teacher.attach(backbone)
    exact = FullTeacher(tiny.backbone(second_pipeline), guidance_scale=2.0)
    exact.attach(backbone)
    assert teacher.velocity(*state).dtype == torch.float32
    torch.testing.assert_close(teacher.velocity(*state), exact.velocity(*state), rtol=0, atol=0.1)


def test_a_teacher_of_other_latents_is_refused(backbone, tmp_path):
    tiny.transformer(in_channels=8, out_channels=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model '.*' has in_channels 8, the backbone 4; expected the same"):
        FullTeacher(tiny.backbone(str(tmp_path))).attach(backbone)


@pytest.mark.gpu
def test_a_teacher_on_another_device_gives_its_velocities_here(tiny_pipeline, second_pipeline):
    ours = tiny.backbone(tiny_pipeline)
    ours.load("cuda")
    state = torch.randn(2, 4, 8, 8).cuda(), torch.tensor([1.0, 0.3]).cuda(), ours.encode(TEXTS)
    there, here = (FullTeacher(tiny.backbone(second_pipeline), 2.0, device) for device in ("cpu", None))
    for teacher in (there, here):
        teacher.attach(ours)
    assert there.velocity(*state).device.type == "cuda"
    torch.testing.assert_close(there.velocity(*state), here.velocity(*state), rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("targets", [LoRASpec().targets, ("attn.to_q", "ff.net.2", "proj_out")], ids=["usual", "other"])
def test_what_we_export_loads_in_peft_and_in_diffusers(backbone, state, tiny_pipeline, tmp_path, targets):
    export_adapter(student(backbone, targets=targets), tmp_path, card())
    ours = backbone.velocity(*state, adapter="student").detach()

    adapted = PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), str(tmp_path))
    torch.testing.assert_close(stock_velocity(adapted, state), ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(stock_velocity(adapted.merge_and_unload(), state), ours, rtol=0, atol=1e-5)

    for options in ({"weight_name": DIFFUSERS_WEIGHTS}, {}):
        pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
        pipe.load_lora_weights(str(tmp_path), **options)
        torch.testing.assert_close(stock_velocity(pipe.transformer, state), ours, rtol=0, atol=1e-6)
        pipe.fuse_lora()
        torch.testing.assert_close(stock_velocity(pipe.transformer, state), ours, rtol=0, atol=1e-5)


def test_pictures_of_an_exported_student_are_the_stock_pipeline_s(backbone, tiny_pipeline, tmp_path):
    """The way of using a result that model cards tell of."""
    export_adapter(student(backbone), tmp_path, card())
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(tmp_path)).merge_and_unload()
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, *backbone.latent_shape())
    options = {"num_inference_steps": 3, "guidance_scale": 4.5, "max_sequence_length": 8, "output_type": "latent"}
    theirs = pipe(TEXTS, height=16, width=16, latents=x, **options).images

    field = lambda x, sigma, cond: backbone.velocity(x, sigma, cond, "student", 4.5)  # noqa: E731
    ours = Sampler(num_steps=3).draw(field, backbone.encode(TEXTS), x).detach()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_we_merge_and_export_loads_everywhere(backbone, state, tiny_pipeline, tmp_path):
    kinds = [{"rank": 4, "alpha": 8}, {"rank": 2, "alpha": 1, "targets": ("attn.to_q", "ff.net.2")}]
    experts = [tiny.expert(tmp_path / str(i), tiny_pipeline, seed=i, **kind) for i, kind in enumerate(kinds)]
    export_adapter(Merge(experts).adapter(), tmp_path / "merged", card())
    teacher = LoRATeacher(str(tmp_path / "merged"))
    teacher.attach(backbone)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(str(tmp_path / "merged"))
    torch.testing.assert_close(stock_velocity(pipe.transformer, state), teacher.velocity(*state), rtol=0, atol=1e-6)


def test_the_card_is_the_hub_s_and_tells_how_the_adapter_was_made(backbone, tiny_pipeline, tmp_path):
    adapter = student(backbone)
    told = card(facts={"objective": "TransitionKL", "seed": "7"}, teachers=[("ocr", "LoRATeacher", "0123abcd")])
    export_adapter(adapter, tmp_path, told)
    content = HubCard.load(tmp_path / "README.md")
    assert content.data.base_model == "org/base"
    assert content.data.to_dict()["library_name"] == "peft"
    assert {"flowopd", "lora"} <= set(content.data.tags)
    facts = (
        "OPDStudent",
        "TransitionKL",
        "LoRATeacher, fingerprint 0123abcd",
        adapter.fingerprint(),
        "rank 3, alpha 7",
    )
    assert all(fact in content.text for fact in (*facts, "| seed | 7 |", f"diffusers {version('diffusers')}"))
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "org/base"
    export_adapter(adapter, tmp_path, card(tiny_pipeline))
    assert HubCard.load(tmp_path / "README.md").data.base_model is None  # a folder is no model of the hub


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (1.0, r"Draw without guidance \(`guidance_scale=1\.0`\)"),
        (4.5, r"Draw with guidance 4\.5 \(`guidance_scale=4\.5`\)"),
        (0.5, r"trained at `guidance_scale=0\.5`; diffusers draws without guidance at 1 and below"),
    ],
)
def test_the_card_tells_at_which_guidance_to_draw_in_the_pipeline_s_own_argument(backbone, tmp_path, scale, said):
    export_adapter(student(backbone), tmp_path, card(guidance_scale=scale))
    text = (tmp_path / "README.md").read_text()
    assert re.search(said, text)
    assert f'pipe("PROMPT", guidance_scale={scale}).images[0]' in text
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone.path)
    pipe._guidance_scale = scale
    assert pipe.do_classifier_free_guidance == (scale > 1)


def test_a_folded_student_s_card_says_without_guidance(tiny_pipeline, tmp_path):
    teacher = LoRATeacher(tiny.expert(tmp_path / "expert", tiny_pipeline), guidance_scale=4.5)
    policy = tiny.policy(OPDStudent, tiny_pipeline)
    tiny.trainer(tmp_path, [TeacherCallback(["red"], teacher), AdapterExport()]).fit(policy, tiny.data())
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "Draw without guidance (`guidance_scale=1.0`)" in text
    assert "guidance_scale=4.5)" in text  # the teacher's, among the facts


def test_a_fit_exports_a_card_that_knows_its_teachers(tiny_pipeline, tmp_path):
    teacher = LoRATeacher(tiny.expert(tmp_path / "expert", tiny_pipeline))
    policy = tiny.policy(OPDStudent, tiny_pipeline)
    tiny.trainer(tmp_path, [TeacherCallback(["red"], teacher), AdapterExport()]).fit(policy, tiny.data(seed=5))
    text = (tmp_path / "adapter" / "README.md").read_text()
    for fact in ("OPDStudent", "TransitionKL", "teacher-red", teacher.fingerprint(), "6 optimiser steps", "| seed | 5"):
        assert fact in text
    assert policy.student().fingerprint() in text


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("victim", ["adapter", "config", "diffusers", "card"])
def test_a_full_disk_leaves_the_last_good_adapter(backbone, tmp_path, monkeypatch, victim):
    adapter = student(backbone)
    export_adapter(adapter, tmp_path, card())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        adapter_parameters(backbone.network, "student")[0].add_(1)
    fill_disk_at(victim, monkeypatch)
    with pytest.raises(
        ValueError, match=r"cannot write to .*: .*No space left on device.*; what was there .* unharmed"
    ):
        export_adapter(take_adapter(backbone.network, "student"), tmp_path, card())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert read_adapter(str(tmp_path)).fingerprint() == adapter.fingerprint()


def fill_disk_at(victim: str, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    places = {
        "adapter": "flowopd.models.adapters.files.save_file",
        "config": "peft.LoraConfig.save_pretrained",
        "diffusers": "diffusers.StableDiffusion3Pipeline.save_lora_weights",
        "card": "pathlib.Path.write_text",
    }
    monkeypatch.setattr(places[victim], full)


def test_a_place_that_cannot_be_written_to_is_named(backbone, tmp_path):
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write to .*adapter: "):
        export_adapter(student(backbone), tmp_path / "adapter", card())
