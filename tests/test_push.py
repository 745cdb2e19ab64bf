"""The laws of what is pushed: everything is in the folder, the card's snippet draws, and the hub gets each byte."""

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import constants
from PIL import Image

from flowopd.cli import run as command_line
from flowopd.core import LinearSchedule
from flowopd.evaluation import Shots
from flowopd.models import LoRASpec, QwenImageBackbone, SD3Backbone, ZImageBackbone
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, read_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter, take_adapter
from flowopd.rollouts import Sampler
from flowopd.training.callbacks.export import drawing

PROMPTS = ["a red dog", 'a sign that says "hi"']
CONFIG = """
model: {init_args: {backbone: {init_args: {path: org/base}}, start: {init_args: {adapters: [org/ink, {path: mine}]}}}}
trainer:
  callbacks:
    - class_path: flowopd.TeacherCallback
      init_args: {tasks: [a], teacher: {class_path: flowopd.LoRATeacher, init_args: {path: org/toy}}}
    - {class_path: flowopd.ResultsTable}
"""


@pytest.fixture(scope="module")
def drawn(tiny_pipeline, tmp_path_factory):
    """A backbone with a student of random numbers."""
    backbone = tiny.loaded(tiny_pipeline, resolution=16)
    add_adapter(backbone.network, "student", LoRASpec(rank=2, alpha=4), backbone.targets)
    return randomised(backbone)


def randomised(backbone):
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapter_parameters(backbone.network, "student"):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=numbers))
    return backbone


def card(backbone, sampler: Sampler, scale: float, base: str) -> ModelCard:
    return ModelCard(
        base,
        "OPDStudent",
        guidance_scale=scale,
        pipeline=backbone.pipeline_name,
        call=backbone.call(scale),
        drawing=drawing(sampler.on(backbone), backbone),
        dtype="float32",
    )


@pytest.fixture
def run(drawn, tmp_path, monkeypatch):
    """What a fit leaves behind, as far as a push reads it."""
    monkeypatch.chdir(tmp_path)
    told = card(drawn, Sampler(num_steps=2), 1.0, "org/base")
    export_adapter(take_adapter(drawn.network, "student"), Path("run/adapter"), told)
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    Shots(5, PROMPTS, ["a", "a"], {"base": pictures, "student": pictures}, {}).save(Path("run/images/shots/models.png"))
    Image.new("RGB", (64, 64)).save("run/images/models.png")
    Path("run/results.md").write_text("| model | fixed_kl/toy |\n|---|---|\n| student | 0.100 |\n")
    Path("run/config.yaml").write_text(CONFIG)
    Path("mine").mkdir()
    Path("mine/README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# mine\n")
    return Path("run")


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed, and knows the licence of every model."""

    files: dict[str, bytes]

    def do_GET(self):
        licence = {"license": "other", "license_name": "toy-1", "license_link": "https://example.org/toy"}
        self.answer({"id": self.path.removeprefix("/api/models/"), "cardData": licence, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{constants.ENDPOINT}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            found = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({file["path"]: base64.b64decode(file["content"]) for file in found})
            self.answer({"commitUrl": f"{constants.ENDPOINT}/user/pets/commit/1", "commitOid": "1" * 40})

    def answer(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Be quiet."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[dict[str, bytes]]:
    """A server of our own instead of the hub; the files that were committed to it."""
    Hub.files = {}
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_card_tells_no_path_from_the_root(run, flowopd, tmp_path):
    told = ModelCard("org/base", "OPDStudent", {"teacher a": f"LoRATeacher(path='{tmp_path}/mine')"})
    Path("run/adapter/README.md").write_text(told.text(read_adapter("run/adapter")))
    Path("run/config.yaml").write_text(CONFIG.replace("path: mine", f"path: {tmp_path}/mine"))
    flowopd("push", "run", "user/pets", "--dry-run")
    text = Path("run/hub/README.md").read_text()
    assert str(tmp_path) not in text
    assert "| ../mine | cc-by-4.0 |" in text


def test_a_dry_run_writes_all_that_would_be_pushed_and_asks_nobody_offline(run, flowopd, capsys):
    flowopd("push", "run", "user/pets", "--dry-run", "--license", "mit")
    assert capsys.readouterr().out == "wrote run/hub\n"
    files = {str(path.relative_to("run/hub")) for path in Path("run/hub").rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", DIFFUSERS_WEIGHTS, "README.md"}
    assert files == adapter | {"comfyui/pets.safetensors", "images/models.png", "images/0.png", "images/1.png"}
    same = [Path(file).read_bytes() for file in (f"run/hub/{DIFFUSERS_WEIGHTS}", "run/hub/comfyui/pets.safetensors")]
    assert same[0] == same[1]

    found = HubCard.load("run/hub/README.md")
    assert (found.data.base_model, found.data.license) == ("org/base", "mit")
    assert [one["text"] for one in found.data["widget"]] == PROMPTS
    assert all(Path("run/hub", one["output"]["url"]).is_file() for one in found.data["widget"])
    said = ("# pets", 'adapter = "user/pets"', "| student | 0.100 |", "No intervals", "Draw without guidance")
    assert all(words in found.text for words in (*said, "| mine | cc-by-4.0 |", "| org/toy | not known |"))
    with Image.open("run/hub/images/0.png") as picture:
        assert picture.size == (256, 256)


def test_scores_of_a_test_bring_their_intervals(run, flowopd):
    Path("bench").mkdir()
    Path("bench/results.md").write_text("| model | toy |\n|---|---|\n| student | 0.500 [0.400, 0.600] |\n")
    flowopd("push", "run", "user/pets", "--dry-run", "--results", "bench")
    text = Path("run/hub/README.md").read_text()
    assert "0.500 [0.400, 0.600]" in text
    assert "No intervals" not in text


def test_the_hub_gets_every_byte_and_tells_the_licences(run, flowopd, hub, capsys):
    flowopd("push", "run", "user/pets")
    assert re.search(r"pushed: http://127\.0\.0\.1:\d+/user/pets", capsys.readouterr().out)
    here = {path.relative_to("run/hub").as_posix(): path.read_bytes() for path in Path("run/hub").rglob("*.*")}
    assert hub == here
    found = HubCard(hub["README.md"].decode())
    assert (found.data.license, found.data.license_name) == ("other", "toy-1")
    assert "| org/toy | other (toy-1): https://example.org/toy |" in found.text


def test_a_fit_pushes_at_its_end_and_keeps_what_could_not_be_pushed(run, hub, capsys, monkeypatch):
    command_line._push(run, "user/pets")
    assert "README.md" in hub
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    command_line._push(run, "user/pets")
    said = capsys.readouterr()
    assert said.out.startswith("pushed: http://127.0.0.1")
    assert re.search(
        "^not pushed: cannot push to 'user/pets': .*; try `flowopd push run user/pets`$", said.err, re.MULTILINE
    )
    with pytest.raises(ValueError, match="pets"):
        command_line.Repository("pets")


MISTAKES = {
    "name": (("run", "pets"), r"'pets' is no repository of the hub; expected user/name"),
    "no run": (("mine", "user/pets"), r"'mine' holds no adapter; expected the folder of a finished fit"),
    "no results": (("run", "user/pets", "--results", "mine"), r"'mine' has no results.md"),
    "word": (("run", "user/pets", "--dry"), r"these are not known: --dry; see flowopd push --help"),
    "offline": (("run", "user/pets"), r"cannot push to 'user/pets': .*; is the hub reachable, .* is in run/hub"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_pushed_is_one_sentence(run, flowopd, capsys, mistake):
    words, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        flowopd("push", *words)
    assert stopped.value.code == 2
    assert re.search(f"^flowopd: error: {expected}", capsys.readouterr().err, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------- the snippet

FAMILIES = {
    "sd3": (SD3Backbone, tiny.pipeline, {"resolution": 16, "max_sequence_length": 8}),
    "zimage": (ZImageBackbone, tiny_families.zimage, {"resolution": [16, 24], "max_sequence_length": 160}),
    "qwen": (QwenImageBackbone, tiny_families.qwen, {"resolution": [16, 24], "max_sequence_length": 160}),
}


@pytest.mark.parametrize(
    ("family", "scale"), [("sd3", 1.0), ("sd3", 4.5), ("zimage", 5.0), ("qwen", 4.0), ("qwen", 1.0)]
)
def test_the_snippet_of_a_card_draws_what_is_evaluated(family, scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, pipeline, options = FAMILIES[family]
    pipeline().save_pretrained("base")
    backbone = kind("base", dtype="float32", **options)
    backbone.load()
    add_adapter(backbone.network, "student", LoRASpec(rank=2, alpha=4), backbone.targets)
    sampler = Sampler(num_steps=4, eval_steps=3, guidance_scale=scale).on(randomised(backbone))
    export_adapter(
        take_adapter(backbone.network, "student"), Path("run/adapter"), card(backbone, sampler, scale, "base")
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("run/adapter/README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(compile(snippet, "README.md", "exec"), {})

    torch.manual_seed(0)
    noise = torch.randn(1, *backbone.latent_shape())
    field = lambda x, sigma, cond: backbone.velocity(x, sigma, cond, "student", scale)  # noqa: E731
    with torch.no_grad():
        (ours,) = backbone.decode(sampler.draw(field, backbone.encode(["PROMPT"]), noise))
    theirs = np.array(Image.open("picture.png")).transpose(2, 0, 1) / 255
    assert np.abs(theirs - ours.numpy()).max() < 2 / 255


def test_a_grid_of_its_own_is_told_as_noise_levels(tiny_pipeline):
    backbone = tiny.loaded(tiny_pipeline)
    own, models = (Sampler(num_steps=4, schedule=grid).on(backbone) for grid in (LinearSchedule(), None))
    assert drawing(models, backbone) == {"num_inference_steps": 4, "max_sequence_length": 8}
    assert drawing(own, backbone) == {
        "num_inference_steps": 4,
        "max_sequence_length": 8,
    }  # the scheduler would shift it
    monkey = {"shift": 1.0}
    backbone.files.config = lambda part: monkey
    assert drawing(own, backbone)["sigmas"] == [1.0, 0.75, 0.5, 0.25]
