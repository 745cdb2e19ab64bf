"""The laws of rewards that run elsewhere: the same scores, no silent zero, a server that ends when it is told to."""

import asyncio
import base64
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests
import tiny
import torch
from lightning import Callback
from ranks import free_port

from flowopd.cli.main import main
from flowopd.records import Prompt
from flowopd.rewards import RemoteReward, Scores
from flowopd.rewards.remote import serve
from flowopd.rewards.remote.serve import LIMITS, _server, read, reply
from flowopd.tiles import Crispness
from flowopd.training import GRPOTeacher, RewardCallback

REWARD = '''
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from flowopd.records import Prompt
from flowopd.rewards import Scores


class Picky:
    """Red, with parts; no score where the metadata says so, and an end of the process at the text "die"."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.detail(images, prompts).value

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        if any(prompt.text == "die" for prompt in prompts):
            os._exit(1)
        if any(prompt.text == "bad" for prompt in prompts):
            raise ValueError("a prompt is bad; write another")
        lost = torch.tensor([bool(prompt.metadata.get("lost")) for prompt in prompts])
        red = self.factor * images[:, 0].mean((1, 2)).masked_fill(lost, torch.nan)
        task = torch.tensor([float(len(prompt.task)) for prompt in prompts])
        return Scores(red, {"task": task, "never": torch.full_like(red, torch.nan)})
'''


def ask(*texts: str, **metadata) -> list[Prompt]:
    return [Prompt(text, "red", metadata) for text in texts]


def pictures(count: int) -> torch.Tensor:
    """Images (B, 3, 8, 8) of whole bytes, which PNG keeps."""
    return (torch.rand(count, 3, 8, 8) * 255).round() / 255


# ------------------------------------------------------------------------------------------------------ the real server


class Server:
    """``flowopd serve`` in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, *words: str, **environment: str):
        (folder / "picky.py").write_text(REWARD)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "flowopd", "serve", f"--port={self.port}", "--accelerator=cpu", *words]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, headers: dict[str, str], patience: float = 60):
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", headers=headers, timeout=5).text == "ok":
                    return
            except requests.ConnectionError:
                time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.process.communicate()[0]}")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.communicate(timeout=30)[0]
        finally:
            self.process.kill()

    def family(self) -> list[int]:
        """The process and all that it started."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.process.pid in ancestors(pid)]


def ancestors(pid: int) -> list[int]:
    line = []
    while pid > 1:
        line.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return []
    return line


def gone(family: list[int], patience: float = 5) -> bool:
    """Whether all these processes end; helpers of Python's own notice a little later that nobody needs them."""
    deadline = time.monotonic() + patience
    while alive := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not alive


KEY = {"X-API-Key": "secret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    words = ["--reward.class_path=picky.Picky", "--reward.init_args.factor=2", "--api_key_env=PICKY_KEY"]
    running = Server(tmp_path_factory.mktemp("server"), *words, PICKY_KEY="secret")
    running.wait(KEY)
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def remote(server, monkeypatch):
    monkeypatch.setenv("PICKY_KEY", "secret")
    return RemoteReward(server.url, api_key_env="PICKY_KEY", batch_size=2)


def test_a_remote_reward_scores_as_the_reward_itself(remote):
    images = pictures(5)
    scores = remote.detail(images, ask("a", "b", "c", "d", "e"))
    assert torch.equal(scores.value, 2 * images[:, 0].mean((1, 2)))
    assert torch.equal(scores.parts["task"], torch.full((5,), 3.0))
    assert scores.parts["never"].isnan().all()
    assert remote.failures == 0
    assert torch.equal(remote.score((images * 255).byte(), ask(*"abcde")), scores.value)


def test_a_row_without_a_score_is_nan_and_counted(remote, caplog):
    prompts = [*ask("a"), *ask("b", lost=True), *ask("c")]
    scores = remote.score(pictures(3), prompts)
    assert scores.isnan().tolist() == [False, True, False]
    assert remote.failures == 1
    assert "1 of 2 images got no score: the reward failed on this image" in caplog.text


def test_a_sentence_of_the_reward_comes_back(remote):
    remote.on_failure = "raise"
    with pytest.raises(ConnectionError, match="1 of 1 images got no score: status 422, a prompt is bad; write another"):
        remote.score(pictures(1), ask("bad"))


def test_a_wrong_key_is_refused_and_named(server, monkeypatch):
    monkeypatch.setenv("OTHER", "guess")
    for name in ("OTHER", None):
        with pytest.raises(ValueError, match=r"wants another key .*; name its variable in api_key_env"):
            RemoteReward(server.url, api_key_env=name).score(pictures(1), ask("a"))
    with pytest.raises(ValueError, match="environment variable 'NOBODY', which is empty"):
        RemoteReward(server.url, api_key_env="NOBODY").score(pictures(1), ask("a"))


def png(width: int, height: int, cut: int = 0) -> str:
    """A grey PNG of any size; its pixels are missing, as far as it is large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (width + 1)) if width * height < 1 << 25 else b"")
    chunks = [(b"IHDR", head), (b"IDAT", pixels[: len(pixels) - cut]), (b"IEND", b"")]
    coded = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        coded += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return base64.b64encode(coded).decode()


def asked(*images: str, prompt: str = "a", **more) -> dict:
    return {"images": list(images), "prompts": [prompt] * len(images), **more}


def nested(depth: int) -> dict:
    return json.loads('{"a":' * depth + "1" + "}" * depth)


def as_bytes(request: dict) -> bytes:
    return json.dumps(request).encode()


BAD = {
    "no JSON": (b"{", "expected a JSON object"),
    "no object": (b"[1]", "expected a JSON object"),
    "no images": (b'{"prompts": []}', "images: Field required"),
    "no text": (b'{"images": ["a"], "prompts": [3]}', "prompts.0: Input should be a valid string"),
    "no UTF-8": (b'{"images": ["\xff"], "prompts": ["a"]}', "There was an error parsing the body"),
    "no base64": (as_bytes(asked("!")), "images.0: expected base64, got '!'"),
    "no ASCII": (as_bytes(asked("é")), "images.0: expected base64, got 'é'"),
    "no picture": (as_bytes(asked("aGVsbG8=")), "images.0: expected the base64 of a PNG, JPEG or WebP"),
    "nothing": (as_bytes(asked("")), "images.0: expected the base64 of a PNG, JPEG or WebP"),
    "another format": (as_bytes(asked(base64.b64encode(b"BM" + bytes(60)).decode())), "images.0: expected the base64"),
    "cut short": (as_bytes(asked(png(8, 8, cut=8))), "images.0: a broken PNG, JPEG or WebP"),
    "no size": (as_bytes(asked(png(0, 8))), "images.0: "),
    "large": (as_bytes(asked(png(12000, 8))), "images.0: pixels of a side: 12000; expected 4096 at most"),
    "too large": (as_bytes(asked(png(12000, 12000))), "images.0: far more than 4096 pixels of a side"),
    "a bomb": (as_bytes(asked(png(20000, 20000))), "images.0: far more than 4096 pixels of a side"),
    "deep": (as_bytes(asked(png(8, 8), metadata=[nested(400)])), "metadata.0: levels of nesting: 400; expected 64"),
    "very deep": (b'{"images": ' + b"[" * 100_000, "There was an error parsing the body"),
    "uneven": (b'{"images": ["", ""], "prompts": ["a"]}', "expected as many prompts, tasks and metadata as images"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_one_sentence(server, case):
    body, expected = BAD[case]
    headers = KEY | {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/v1/score", data=body, headers=headers, timeout=10)
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"].startswith(expected)
    assert "0x" not in answer.text  # an address of an object
    assert "\n" not in answer.json()["detail"]


WITHIN_AND_BEYOND = {  # what is just within a limit, and what is beyond it
    "images": (lambda: asked(*[png(1, 1)] * LIMITS["images"]), lambda: asked(*[png(1, 1)] * (LIMITS["images"] + 1))),
    "side": (lambda: asked(png(LIMITS["side"], 1)), lambda: asked(png(1, LIMITS["side"] + 1))),
    "pixels": (lambda: asked(png(8, 8)), lambda: asked(png(8, 8), png(8, 8))),
    "prompt": (
        lambda: asked(png(1, 1), prompt="a" * LIMITS["prompt"]),
        lambda: asked(png(1, 1), prompt="a" * (LIMITS["prompt"] + 1)),
    ),
    "depth": (
        lambda: asked(png(1, 1), metadata=[nested(LIMITS["depth"])]),
        lambda: asked(png(1, 1), metadata=[nested(LIMITS["depth"] + 1)]),
    ),
    "bytes": (lambda: asked(png(1, 1)), lambda: asked(png(1, 1), prompt="a" * 4000)),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_every_limit_of_the_server_holds_and_is_told(limit, monkeypatch):
    within, beyond = WITHIN_AND_BEYOND[limit]
    monkeypatch.setitem(LIMITS, "pixels", 64 if limit == "pixels" else LIMITS["pixels"])  # gigabytes otherwise
    if limit == "bytes":
        monkeypatch.setitem(LIMITS, "bytes", 1000)
        assert posted(as_bytes(beyond())) == (413, {"detail": "Payload too large"})
        return
    assert len(read(within())[0]) >= 1
    with pytest.raises(ValueError, match=rf"(^|: ){'.*'}[0-9]+; expected {LIMITS[limit]} at most$"):
        read(beyond())


def posted(body: bytes) -> tuple[int, dict]:
    """Status and answer of the server's own application, with no worker behind it."""
    options = {"accelerator": "cpu", "devices": 1, "workers_per_device": 1, "timeout": 1.0}
    app = _server('{"class_path": "flowopd.tiles.Crispness"}', None, options).app
    said = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        said.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return said[0]["status"], json.loads(said[1]["body"])


def test_the_page_tells_every_limit():
    page = (Path(serve.__file__).parents[1] / "pages" / "remote.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \|.* \| ([\d ]+) \|$", page, flags=re.MULTILINE))
    assert {name: int(number.replace(" ", "")) for name, number in told.items()} == LIMITS


def test_the_server_says_what_it_is_and_listens_to_this_machine_alone(server):
    model = requests.get(f"{server.url}/info", headers=KEY, timeout=10).json()["model"]
    assert model == {"protocol": "flowopd-reward", "version": 1, "reward": "picky.Picky"}
    with pytest.raises(requests.ConnectionError):  # another address of this machine
        requests.get(f"http://127.0.0.2:{server.port}/health", headers=KEY, timeout=10)


def test_a_stopped_server_leaves_no_process_and_its_client_goes_on(server, remote, caplog):
    """The last use of the server."""
    remote.retries = 0
    assert remote.score(pictures(1), ask("a")).isfinite().all()
    family = server.family()
    assert len(family) >= 3  # the verb, the worker, the one that answers
    output = server.stop()
    assert server.process.returncode == 0
    assert "Traceback" not in output
    assert gone(family)
    assert remote.score(pictures(3), ask("a", "b", "c")).isnan().all()
    assert remote.failures == 3
    assert caplog.text.count("got no score") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    {
        "class": (["--reward=flowopd.tiles.Crispnes"], "flowopd.tiles has no 'Crispnes' (did you mean 'Crispness'?)"),
        "no reward": (["--reward=flowopd.Prompt"], "flowopd.Prompt is not a Reward"),
        "option": (
            ["--reward=flowopd.tiles.Text", "--reward.strikt=1"],
            "no option 'strikt' (did you mean 'strict'?)",
        ),
        "nothing": ([], "the command needs --reward"),
        "port": (
            ["--reward=flowopd.tiles.Text", "--port=80"],
            "port is 80; expected a whole number from 1024",
        ),
        "key": (["--reward=flowopd.tiles.Text", "--api_key_env=NOBODY"], "variable 'NOBODY', which is empty"),
    }.values(),
)
def test_a_mistake_of_the_verb_is_one_sentence(monkeypatch, capsys, words, expected):
    monkeypatch.setattr(sys, "argv", ["flowopd", "serve", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert errors.startswith("flowopd: error: ")
    assert expected in errors
    assert "\n" not in errors


def test_a_taken_port_is_one_sentence(monkeypatch, capsys):
    with faulty(200) as url:
        port = url.rpartition(":")[2]
        monkeypatch.setattr(sys, "argv", ["flowopd", "serve", "--reward=flowopd.tiles.Crispness", f"--port={port}"])
        with pytest.raises(SystemExit):
            main()
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err


def test_what_is_not_a_number_leaves_as_null():
    answer = reply(Scores(torch.tensor([1.0, torch.nan, torch.inf]), {"p": torch.tensor([0.0, 1.0, torch.nan])}), "x.Y")
    assert answer["scores"] == [1.0, None, None]
    assert answer["parts"] == {"p": [0.0, 1.0, None]}
    assert answer["errors"].keys() == {"1", "2"}
    json.dumps(answer, allow_nan=False)


def test_pictures_of_two_sizes_are_refused():
    from flowopd.rewards.remote.client import _body

    small, large = (json.loads(_body(torch.zeros(1, 3, s, s, dtype=torch.uint8), ask("a"))) for s in (4, 8))
    with pytest.raises(ValueError, match=r"expected images of one size, got \[\(4, 4\), \(8, 8\)\]"):
        read({"images": small["images"] + large["images"], "prompts": ["a", "b"]})


# --------------------------------------------------------------------------------------------------------------- faults


INFO = {"model": {"protocol": "flowopd-reward", "version": 1}}


@contextmanager
def faulty(*answers, info=(200, INFO)):
    """A server that gives these answers to POST, the last of them for ever: a status, an object, text, or seconds."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            self.answer(*info)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers[min(Handler.asked, len(answers) - 1)]
            Handler.asked += 1
            if isinstance(answer, float):
                time.sleep(answer)
            status, body = (answer, {"detail": "no"}) if isinstance(answer, int) else (200, answer)
            self.answer(status, body)

        def answer(self, status, body):
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients hang up on purpose
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


GOOD = {"scores": [0.5, 1], "parts": {"exact": [0, None]}, "errors": {}}


def client(url: str, **options) -> RemoteReward:
    return RemoteReward(url, **({"retries": 0, "timeout": 5} | options))


def test_a_busy_server_is_asked_again():
    with faulty(429, 503, GOOD) as url:
        reward = client(url, retries=2)
        scores = reward.detail(pictures(2), ask("a", "b"))
    assert scores.value.tolist() == [0.5, 1.0]
    assert scores.parts["exact"][0] == 0
    assert reward.failures == 0


FAULTS = {
    "busy for good": (429, "status 429, no"),
    "broken": (500, "status 500, no"),
    "garbage": ("<html>", "the reply is no JSON object: '<html>'"),
    "a list": ([1, 2], "the reply is no JSON object"),
    "too few": ({"scores": [1.0]}, r"scores: expected 2 numbers, got \[1.0\]"),
    "too many": ({"scores": [1, 2, 3]}, r"scores: expected 2 numbers"),
    "no scores": ({}, "scores: expected 2 numbers, got None"),
    "words": ({"scores": ["1", "2"]}, "scores: expected numbers, got '1'"),
    "truth values": ({"scores": [True, False]}, "scores: expected numbers, got True"),
    "parts of another length": (GOOD | {"parts": {"p": [1]}}, "part 'p': expected 2 numbers"),
    "parts that are none": (GOOD | {"parts": [1, 2]}, "parts are no JSON object"),
    "late": (1.0, "ReadTimeoutError|ReadTimeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_nan_counted_and_told_or_ends_the_run(fault, caplog):
    answer, expected = FAULTS[fault]
    with faulty(answer) as url:
        patience = 0.2 if fault == "late" else 10
        reward = client(url, timeout=patience)
        scores = reward.score(pictures(2), ask("a", "b"))
        assert scores.isnan().all()
        assert reward.failures == 2
        assert caplog.records[-1].levelno == logging.WARNING
        with pytest.raises(ConnectionError, match=f"2 of 2 images got no score: {expected}"):
            client(url, timeout=patience, on_failure="raise").score(pictures(2), ask("a", "b"))


@pytest.mark.parametrize("scores", [[1.0, None], [1.0, float("nan")], [1.0, float("inf")], [1.0, 10**400]])
def test_null_and_what_is_not_finite_fail_alone(scores):
    with faulty({"scores": scores}) as url:
        reward = client(url)
        assert reward.score(pictures(2), ask("a", "b")).isnan().tolist() == [False, True]
        assert reward.failures == 1


def test_a_refused_connection_is_a_failure_until_somebody_listens(caplog):
    reward = client(f"http://127.0.0.1:{free_port()}")
    assert reward.score(pictures(2), ask("a", "b")).isnan().all()
    assert "NewConnectionError" in caplog.text
    with faulty(GOOD) as url:
        reward.url = url
        assert reward.score(pictures(2), ask("a", "b")).isfinite().all()
    assert reward.failures == 2


def test_one_chunk_that_fails_leaves_the_others_their_scores_and_parts():
    with faulty(GOOD, 500, GOOD) as url:
        scores = client(url, batch_size=2).detail(pictures(6), ask(*"abcdef"))
    assert scores.value.isnan().tolist() == [False, False, True, True, False, False]
    assert scores.parts["exact"].isnan().tolist() == [False, True, True, True, False, True]


@pytest.mark.parametrize("info", [(404, "nothing here"), (200, {"model": None}), (200, {"model": {"version": 2}})])
def test_what_is_no_reward_server_is_refused_whatever_a_failure_does(info):
    with faulty(GOOD, info=info) as url, pytest.raises(ValueError, match=r"start (one|it) by flowopd serve"):
        client(url).score(pictures(2), ask("a", "b"))


def test_bad_input_of_a_client_is_one_sentence():
    with pytest.raises(ValueError, match="url is 'localhost:80'; expected the address of a reward server, such as"):
        RemoteReward("localhost:80")
    with pytest.raises(ValueError, match=r"timeout is 0; expected a number from 0.001 to 86400.0"):
        RemoteReward("http://localhost", timeout=0)
    with pytest.raises(ValueError, match="metadata of a prompt cannot be sent to a reward server as JSON"):
        client("http://127.0.0.1:9").score(pictures(1), ask("a", what=object()))
    with pytest.raises(ValueError, match=r"expected images of shape"):
        client("http://127.0.0.1:9").score(pictures(1)[0], ask("a"))


def test_the_built_in_rewards_read_what_the_wire_brings():
    """Images leave as bytes and arrive in [0, 1]."""
    from flowopd.rewards.remote.client import _body

    images = torch.rand(2, 3, 32, 32)
    arrived, prompts = read(json.loads(_body((images * 255).round().byte(), ask("a", "b", n=1))))
    assert torch.equal(arrived, (images * 255).round() / 255)
    assert prompts == ask("a", "b", n=1)
    torch.testing.assert_close(
        Crispness().score(arrived, prompts), Crispness().score(images, prompts), atol=5e-2, rtol=0
    )


# ------------------------------------------------------------------------------------------------------ killed mid-run


class Scorer(BaseHTTPRequestHandler):
    """Answers with numbers that differ, so that there is something to learn."""

    def do_GET(self):
        self.answer(INFO)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"scores": [len(image) % 7 / 7 for image in asked["images"]]})

    def answer(self, body):
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class Kill(Callback):
    """Ends the server after the first of the iterations, and keeps the figures of every one."""

    def __init__(self, server: ThreadingHTTPServer):
        self.server, self.figures = server, []

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.figures:
            self.server.shutdown()
            self.server.server_close()
        self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


ENDS = {"nan": (ValueError, "reward 'far' failed for all 8 pictures"), "raise": (ConnectionError, "got no score")}


@pytest.mark.parametrize("on_failure", ENDS)
@pytest.mark.parametrize("background", [False, True])
def test_a_server_killed_mid_run_ends_it_in_a_sentence(tiny_pipeline, tmp_path, on_failure, background):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    remote = client(f"http://127.0.0.1:{server.server_port}", on_failure=on_failure, batch_size=4)
    policy, kill = tiny.policy(GRPOTeacher, tiny_pipeline), Kill(server)
    reward = RewardCallback("far", remote, background=background)
    trainer = tiny.trainer(tmp_path, [reward, kill], max_epochs=2)
    error, sentence = ENDS[on_failure]
    with pytest.raises(error, match=sentence):
        trainer.fit(policy, tiny.data())
    (figures,) = kill.figures
    assert "reward/far/failed" not in figures
    assert figures["reward/far"] > 0
    assert all(value.isfinite().all() for value in policy.student().tensors.values())
