"""Judges, asked over a chat API that this file plays on loopback: fair ones, strange ones and broken ones."""

import base64
import io
import json
import logging
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from flowopd.records import Prompt
from flowopd.rewards import Judge


class ChatServer(ThreadingHTTPServer):
    """Answers as ``reply`` says; remembers what it was asked, and how many requests were under way at once."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Chat)
        self.models = {"object": "list", "data": [{"id": "judge-7b"}]}
        self.reply = lambda text, image: "Final Score: 4"
        self.script = []  # statuses of the next requests, 200 once it is empty
        self.asked, self.paths, self.keys = [], [], []
        self.lock, self.now, self.peak = threading.Lock(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Chat(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.remember()
        self.send(200 if self.path == "/v1/models" else 404, self.server.models)

    def do_POST(self):
        self.remember()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.now += 1
            server.peak = max(server.peak, server.now)
            status = server.script.pop(0) if server.script else 200
        image, text = body["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"), validate=True)
        pixels = np.array(Image.open(io.BytesIO(data)))
        answer = server.reply(text["text"], pixels) if status == 200 else "no"
        with server.lock:
            server.now -= 1
        reply = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        self.send(status, answer if isinstance(answer, bytes) else reply)

    def remember(self):
        self.server.paths.append(self.path)
        self.server.keys.append(self.headers["Authorization"])

    def send(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def judge(server):
    return made_judge(server)


def made_judge(server, **options):
    return Judge(server.url, "judge-7b", **({"retries": 1, "timeout": 5} | options))


def images(rows=3):
    """Row i is of one grey, i."""
    return torch.arange(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


def prompts(rows=3):
    return [Prompt(f"caption {i}", "any") for i in range(rows)]


# ------------------------------------------------------------------------------------------------------- what is asked


def test_a_request_is_a_chat_completion_about_one_png(server, judge):
    assert judge.score(images(1), prompts(1)).tolist() == pytest.approx([0.8])
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0, 2048)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert "caption 0" in message["content"][1]["text"]
    assert "{prompt}" not in message["content"][1]["text"]
    assert server.paths == ["/v1/models", "/v1/chat/completions"]


def test_the_picture_arrives_unchanged_unless_it_is_to_be_resized(server):
    seen = []
    server.reply = lambda text, image: seen.append(image) or "<OverallScore>3</OverallScore> Final Score: 3"
    image = torch.randint(0, 256, (1, 3, 8, 6), dtype=torch.uint8)
    made_judge(server, template="qwen_overall").score(image, prompts(1))
    made_judge(server).score(image, prompts(1))
    made_judge(server, resize=16).score(image, prompts(1))
    assert (seen[0] == image[0].permute(1, 2, 0).numpy()).all()
    assert [picture.shape for picture in seen[1:]] == [(512, 512, 3), (16, 16, 3)]


def test_each_image_keeps_its_row_whatever_the_order_of_the_answers(server):
    def late_first(text, image):
        time.sleep(0.02 * (5 - image[0, 0, 0] % 6))
        assert f"caption {image[0, 0, 0]}\n" in text
        return f"Final Score: {1 + image[0, 0, 0] / 10}"

    server.reply = late_first
    scores = made_judge(server, concurrency=12, resize=8).detail(images(12), prompts(12))
    torch.testing.assert_close(scores.parts["paper"], 1 + torch.arange(12) / 10)
    torch.testing.assert_close(scores.value, scores.parts["paper"] / 5)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_requests_are_under_way_than_allowed(server, concurrency):
    server.reply = lambda text, image: time.sleep(0.03) or "Final Score: 2"
    made_judge(server, concurrency=concurrency, resize=8).score(images(12), prompts(12))
    assert server.peak == concurrency


def test_the_models_are_asked_for_once(server, judge):
    judge.score(images(), prompts())
    judge.score(images(), prompts())
    assert server.paths.count("/v1/models") == 1


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    made_judge(server, api_key_env="JUDGE_KEY").score(images(1), prompts(1))
    assert server.keys == ["Bearer secret"] * 2
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="expected in the environment variable 'JUDGE_KEY', which is empty"):
        made_judge(server, api_key_env="JUDGE_KEY").score(images(1), prompts(1))


def test_braces_in_a_caption_are_just_text(server, judge):
    judge.score(images(1), [Prompt('{"a": {0}} {prompt}', "any")])
    assert '{"a": {0}} {prompt}' in server.asked[0]["messages"][0]["content"][1]["text"]


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Fine.\nFinal Score: 4.25", 4.25),
        ("**Final Score:** 3", 3),
        ("Final Score: 2, or rather\nFinal Score: 5", 5),
        ("Final Score: 4/5", 4),
    ],
)
def test_the_last_final_score_counts(server, judge, answer, score):
    server.reply = lambda text, image: answer
    assert judge.detail(images(1), prompts(1)).parts["paper"].item() == score


@pytest.mark.parametrize(
    "answer", ["Final Score: 45", "Final Score: 6", "Final Score: 5.5", "Final Score: x", "", None]
)
def test_an_answer_without_a_score_in_range_is_nan(server, judge, answer):
    server.reply = lambda text, image: answer
    scores = judge.detail(images(1), prompts(1))
    assert scores.value.isnan().all()
    assert scores.parts["paper"].isnan().all()
    assert judge.failures == 1


def test_three_axes_are_parts_and_their_mean_the_score(server):
    server.reply = lambda text, image: (
        "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\n" + ("" if image[0, 0, 0] else "Style Score (1-5): 3")
    )
    scores = made_judge(server, template="unified_reward_2").detail(images(2), prompts(2))
    assert {name: part[0].item() for name, part in scores.parts.items()} == {
        "alignment": 4.0,
        "coherence": 3.5,
        "style": 3.0,
        "paper": 3.5,
    }
    assert scores.value[0].item() == pytest.approx(0.7)
    assert all(part[1].isnan() for part in scores.parts.values()), "an axis is missing: nothing is read"


def test_the_overall_score_stands_in_tags(server):
    server.reply = lambda text, image: "Looks fine. <OverallScore>4</OverallScore>"
    assert made_judge(server, template="qwen_overall").score(images(1), prompts(1)).item() == pytest.approx(0.8)


@pytest.mark.parametrize("template", ["unified_reward", "unified_reward_2", "qwen_overall"])
def test_a_built_in_rubric_shows_the_prompt_and_the_form_that_is_read(server, template):
    judge = made_judge(server, template=template)
    assert judge.template.count("{prompt}") == 1
    filled = re.sub(r"<number>|(?<=>)number(?=<)", "4", judge.template)
    assert set(judge._numbers(filled).values()) == {4.0}


def test_a_rubric_of_ones_own_is_a_file_and_a_pattern(server, tmp_path):
    (tmp_path / "mine.txt").write_text("From 0 to 100, how red is {prompt}?")
    server.reply = lambda text, image: "90 %" if text == "From 0 to 100, how red is caption 0?" else "0 %"
    mine = made_judge(server, template=str(tmp_path / "mine.txt"), pattern=r"(\d+) %", scale=100)
    assert mine.score(images(2), prompts(2)).tolist() == pytest.approx([0.9, 0])


def test_bytes_and_floats_agree(server, judge):
    server.reply = lambda text, image: f"Final Score: {1 + image.mean() / 100:.3f}"
    picture = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(judge.score(picture, prompts(2)), judge.score(picture / 255, prompts(2)))


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_fault_is_tried_again(server, judge, status):
    server.script = [status]
    assert judge.score(images(1), prompts(1)).isfinite().all()
    assert len(server.asked) == 2
    assert judge.failures == 0


@pytest.mark.parametrize(("status", "tries"), [(429, 2), (502, 2), (400, 1), (401, 1), (404, 1)])
def test_tries_are_bounded_and_the_failure_is_nan_counted_and_logged(server, judge, caplog, status, tries):
    server.script = [status] * 10
    with caplog.at_level(logging.WARNING):
        assert judge.score(images(1), prompts(1)).isnan().all()
    assert len(server.asked) == tries
    assert judge.failures == 1
    assert f"judge judge-7b: 1 of 1 images got no score: status {status}" in caplog.text


def test_a_slow_server_is_tried_again_and_then_given_up(server):
    server.reply = lambda text, image: time.sleep(0.5) or "Final Score: 3"
    judge = made_judge(server, timeout=0.1)
    assert judge.score(images(1), prompts(1)).isnan().all()
    assert len(server.asked) == 2


@pytest.mark.parametrize("answer", [b"garbage", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_a_garbled_reply_is_nan(server, judge, answer):
    server.reply = lambda text, image: answer
    assert judge.score(images(1), prompts(1)).isnan().all()


def test_one_failure_costs_one_row(server):
    server.reply = lambda text, image: "?" if image[0, 0, 0] == 1 else "Final Score: 5"
    judge = made_judge(server)
    assert judge.score(images(3), prompts(3)).isnan().tolist() == [False, True, False]
    judge.score(images(3), prompts(3))
    assert judge.failures == 2


def test_a_failure_ends_the_run_if_it_is_to(server):
    server.reply = lambda text, image: "?" if image[0, 0, 0] == 1 else "Final Score: 5"
    judge = made_judge(server, on_failure="raise")
    with pytest.raises(ConnectionError, match="judge judge-7b: 1 of 3 images got no score: 'Final Score"):
        judge.score(images(3), prompts(3))


def test_a_server_that_dies_costs_its_rows_only():
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        judge = made_judge(server)
        assert judge.score(images(2), prompts(2)).isfinite().all()
        server.shutdown()
        thread.join()
    judge._session.close()  # its open connections would still be answered
    assert judge.score(images(2), prompts(2)).isnan().all()
    assert judge.failures == 2


def test_a_server_that_is_not_there_is_a_sentence():
    with ChatServer() as server:
        url = server.url
    with pytest.raises(ConnectionError, match=r"did not answer \(NewConnectionError\); expected the base_url"):
        Judge(url, "judge-7b", retries=0).score(images(1), prompts(1))


def test_a_server_of_something_else_is_a_sentence(server):
    with pytest.raises(ConnectionError, match=r"did not answer \(status 404.*up to and with /v1"):
        Judge(server.url.removesuffix("/v1"), "judge-7b").score(images(1), prompts(1))
    server.models = {"hello": "world"}
    with pytest.raises(ValueError, match="is not a list of models; expected the base_url"):
        made_judge(server).score(images(1), prompts(1))


def test_a_model_that_is_not_served_is_a_sentence(server):
    with pytest.raises(ValueError, match=r"does not serve 'judge-70b'; it serves \['judge-7b'\]"):
        Judge(server.url + "/", "judge-70b").score(images(1), prompts(1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, ValueError, "url is 'localhost:8000/v1'; expected the address of a server"),
        ({"template": "unified"}, FileNotFoundError, "neither a file nor one of unified_reward, unified_reward_2"),
        ({"template": __file__}, ValueError, "say in `pattern` how its answers are read"),
        ({"pattern": "("}, ValueError, "is not a regular expression"),
        ({"pattern": r"\d"}, ValueError, "one group, around the number"),
        ({"pattern": {}}, ValueError, "one group, around the number"),
        ({"concurrency": 0}, ValueError, "concurrency"),
        ({"retries": -1}, ValueError, "retries is -1; expected at least 0"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        Judge(**({"base_url": "http://127.0.0.1:1/v1", "model": "m"} | options))
