"""Vision-language models as judges, asked over the OpenAI chat API that vLLM and SGLang serve."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from flowopd.core.ranges import above, at_least, one_of
from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes
from flowopd.rewards.remote.http import (
    OnFailure,
    Unanswered,
    address,
    check_patience,
    exchange,
    key_in,
    new_session,
    png,
    tell,
)

FOLDER = Path(__file__).parent / "rubrics"
NUMBER = r"[\s*]*([1-5](?:\.\d+)?)(?!\d)"  # "4", "**4.5", not "45"


@dataclass(frozen=True)
class Rubric:
    """How the answer to a built-in rubric is read, and the image it is asked about.

    Args:
        pattern: regular expressions with one group, the number; by the name of what they rate, "" if it has none.
        resize: side of the square that the image is resized to; None leaves it as it is.
    """

    pattern: Mapping[str, str]
    resize: int | None = None


RUBRICS = {
    "unified_reward": Rubric({"": f"Final Score:{NUMBER}"}, resize=512),
    "unified_reward_2": Rubric(
        {axis.lower(): rf"{axis} Score \(1-5\):{NUMBER}" for axis in ("Alignment", "Coherence", "Style")}
    ),
    "qwen_overall": Rubric({"": r"<OverallScore>\s*([1-5])\s*</OverallScore>"}),
}


class Judge:
    """What a vision-language model says of an image,  r = mean of the numbers in its answer / scale.

    The answer is read by regular expressions, the last match of each. An image whose request fails, or whose answer
    cannot be read, scores NaN; these are counted in ``failures`` and logged. The part ``paper`` is the mean of the
    numbers before it is divided; several patterns make a part each.

    Args:
        base_url: of the server, up to and with ``/v1``.
        model: name under which the server serves the judge.
        template: a built-in rubric (``unified_reward``, ``unified_reward_2``, ``qwen_overall``) or a text file; the
            prompt stands in for ``{prompt}``.
        pattern: regular expression with one group around the number, or several by name; the rubric's own if None.
        scale: the highest number of the rubric.
        concurrency: requests under way at once.
        retries: further tries after a status of 408, 429 or 5xx, a time-out, or a connection refused or dropped.
        timeout: seconds until the server must answer.
        max_tokens: of an answer.
        resize: side of the square that images are resized to, pixels; the rubric's own if None.
        api_key_env: name of the environment variable that holds the server's key.
        on_failure: whether an image without a score is ``nan``, or ``raise`` ends the run.

    Raises:
        FileNotFoundError: if the template is neither a rubric nor a file.
        ValueError: if the address is none, a pattern is missing or cannot be used, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str = "unified_reward",
        pattern: str | dict[str, str] | None = None,
        scale: float = 5.0,
        concurrency: int = 32,
        retries: int = 3,
        timeout: float = 120.0,
        max_tokens: int = 2048,
        resize: int | None = None,
        api_key_env: str | None = None,
        on_failure: OnFailure = "nan",
    ) -> None:
        check_patience(timeout, retries)
        at_least(1, concurrency=concurrency, max_tokens=max_tokens, resize=resize)
        above(0.0, scale=scale)
        one_of(OnFailure, on_failure=on_failure)
        self.base_url = address(base_url, "a server, such as http://127.0.0.1:8001/v1")
        self.model = model
        self.template = _text(template)
        self.patterns = _compiled(pattern, template)
        self.scale = scale
        self.concurrency = concurrency
        self.retries = retries
        self.timeout = timeout
        self.max_tokens = max_tokens
        self.resize = resize or (RUBRICS[template].resize if template in RUBRICS else None)
        self.api_key_env = api_key_env
        self.on_failure = on_failure
        self.failures = 0
        self._session: requests.Session | None = None

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores (B,) on the images' device, with the rubric's numbers.

        Raises:
            ConnectionError: at the first use, if the server cannot be reached; later, if an image gets no score and
                that ends the run.
            ValueError: at the first use, if it does not serve the model or the key is missing.
        """
        pictures = as_bytes(images, prompts)
        session = self._connected()
        if self.resize:
            pictures = vision.resize(pictures, [self.resize] * 2, vision.InterpolationMode.BICUBIC, antialias=True)
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(lambda *job: self._judged(session, *job), pictures.cpu(), prompts))
        return self._scores(answers, images.device)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device."""
        return self.detail(images, prompts).value

    def _judged(self, session: requests.Session, image: Tensor, prompt: Prompt) -> dict[str, float] | Unanswered:
        try:
            return self._numbers(self._answer(session, image, prompt.text))
        except Unanswered as reason:
            return reason

    def _answer(self, session: requests.Session, image: Tensor, text: str) -> str:
        """What the judge writes about one image (3, H, W) uint8."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}},
            {"type": "text", "text": self.template.replace("{prompt}", text)},
        ]
        options = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens}
        body = json.dumps(options | {"messages": [{"role": "user", "content": content}]}).encode()
        reply = exchange(session, "POST", f"{self.base_url}/chat/completions", self.timeout, body)
        try:
            answer = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise Unanswered("the reply is not a chat completion") from None
        if not isinstance(answer, str):
            raise Unanswered("the answer holds no text")
        return answer

    def _numbers(self, answer: str) -> dict[str, float]:
        """The numbers in an answer, by name; the last match counts, since a judge may think aloud first."""
        numbers = {}
        for name, pattern in self.patterns.items():
            found = pattern.findall(answer)
            if not found:
                raise Unanswered(f"{pattern.pattern!r} is not in the answer, which ends with {answer[-80:]!r}")
            numbers[name] = _number(found[-1], self.scale)
        return numbers

    def _scores(self, answers: Sequence[dict[str, float] | Unanswered], device: torch.device) -> Scores:
        self._count([answer for answer in answers if isinstance(answer, Unanswered)], len(answers))
        nothing = dict.fromkeys(self.patterns, math.nan)
        rows = [nothing if isinstance(answer, Unanswered) else answer for answer in answers]
        columns = {name: torch.tensor([row[name] for row in rows], device=device) for name in self.patterns}
        mean = torch.stack(list(columns.values())).mean(0)
        return Scores(mean / self.scale, {name: column for name, column in columns.items() if name} | {"paper": mean})

    def _count(self, failed: Sequence[Unanswered], of: int) -> None:
        if failed:
            self.failures += len(failed)
            tell(f"judge {self.model}", len(failed), of, failed[0], self.on_failure)

    def _connected(self) -> requests.Session:
        """The session; at first use, ask whether the server serves the model."""
        if self._session is None:
            key = key_in(self.api_key_env)
            opened = new_session(self.retries, {"Authorization": f"Bearer {key}"} if key else {}, self.concurrency)
            self._check_model(opened)
            self._session = opened
        return self._session

    def _check_model(self, session: requests.Session) -> None:
        expected = "expected the base_url of an OpenAI-compatible server (vLLM, SGLang), up to and with /v1"
        try:
            reply = exchange(session, "GET", f"{self.base_url}/models", self.timeout)
            served = [entry["id"] for entry in reply["data"]]
        except Unanswered as error:
            raise ConnectionError(
                f"the judge's server at {self.base_url} did not answer ({error}); {expected}"
            ) from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.base_url}/models is not a list of models; {expected}") from error
        if self.model not in served:
            raise ValueError(f"the server at {self.base_url} does not serve {self.model!r}; it serves {served}")


def _text(template: str) -> str:
    """The words of a built-in rubric or of a file."""
    file = FOLDER / f"{template}.txt" if template in RUBRICS else Path(template)
    if not file.is_file():
        raise FileNotFoundError(f"template {template!r} is neither a file nor one of {', '.join(RUBRICS)}")
    return file.read_text(encoding="utf-8")


def _compiled(pattern: str | dict[str, str] | None, template: str) -> dict[str, re.Pattern[str]]:
    """Regular expressions by name, "" for one that has none."""
    if pattern is None and template not in RUBRICS:
        raise ValueError(f"template {template!r} is a file; say in `pattern` how its answers are read")
    chosen = RUBRICS[template].pattern if pattern is None else {"": pattern} if isinstance(pattern, str) else pattern
    try:
        compiled = {name: re.compile(expression) for name, expression in chosen.items()}
    except re.error as error:
        raise ValueError(f"pattern {error.pattern!r} is not a regular expression ({error})") from error
    if not compiled or any(expression.groups != 1 for expression in compiled.values()):
        raise ValueError(f"expected patterns with one group, around the number, got {dict(chosen)}")
    return compiled


def _number(text: str, scale: float) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Unanswered(f"{text!r} is not a number") from None
    if not 0 <= number <= scale:
        raise Unanswered(f"{number:g} is not in [0, {scale:g}]")
    return number
