"""The client of a reward server: any reward behind ``flowopd serve``, on another machine or in another environment."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import requests
import torch
from torch import Tensor

from flowopd.core.ranges import at_least, one_of
from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes
from flowopd.rewards.remote.http import (
    RETRIED,
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

PROTOCOL, VERSION = "flowopd-reward", 1


class RemoteReward:
    """A reward that a server computes, started by ``flowopd serve``; images travel as PNG, scores as JSON.

    An image without a score is NaN, never 0: it is counted in ``failures`` and logged with the reason, or ends the
    run. Parts of the scores are carried.

    Args:
        url: of the server, such as http://127.0.0.1:8080.
        api_key_env: name of the environment variable that holds the server's key.
        timeout: seconds until the server must answer a request.
        retries: further tries after a status of 408, 429 or 5xx, a time-out, or a refused or dropped connection.
        on_failure: whether an image without a score is ``nan``, or ``raise`` ends the run.
        batch_size: images per request.

    Raises:
        ValueError: if the address is none, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        on_failure: OnFailure = "nan",
        batch_size: int = 16,
    ) -> None:
        check_patience(timeout, retries)
        at_least(1, batch_size=batch_size)
        one_of(OnFailure, on_failure=on_failure)
        self.url = address(url, "a reward server, such as http://127.0.0.1:8080")
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self.on_failure = on_failure
        self.batch_size = batch_size
        self.failures = 0
        self._session: requests.Session | None = None

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the images' device."""
        return self.detail(images, prompts).value

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores (B,) on the images' device, with the parts that the server sends.

        Raises:
            ConnectionError: if an image gets no score, and that ends the run.
            ValueError: if the server is none for rewards, or wants a key; or metadata cannot be written as JSON.
        """
        pictures = as_bytes(images, prompts).cpu()
        chunks = [slice(i, i + self.batch_size) for i in range(0, len(pictures), self.batch_size)]
        return Scores.cat([self._asked(pictures[chunk], prompts[chunk]) for chunk in chunks]).to(images.device)

    def _asked(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        body = _body(images, prompts)
        try:
            reply = exchange(self._connected(), "POST", f"{self.url}/v1/score", self.timeout, body)
            scores, reason = _scores(reply, len(prompts)), _first_error(reply)
        except Unanswered as error:
            scores, reason = Scores(torch.full((len(prompts),), math.nan)), str(error)
        if failed := int(scores.value.isnan().sum()):
            self.failures += failed
            tell(f"reward server {self.url}", failed, len(prompts), reason, self.on_failure)
        return scores

    def _connected(self) -> requests.Session:
        """The session; until it has succeeded once, ask the server what it is."""
        if self._session is None:
            key = key_in(self.api_key_env)
            opened = new_session(self.retries, {"X-API-Key": key} if key else {})
            self._check(opened)
            self._session = opened
        return self._session

    def _check(self, session: requests.Session) -> None:
        try:
            model = exchange(session, "GET", f"{self.url}/info", self.timeout).get("model")
        except Unanswered as error:
            if error.status in (401, 403):
                raise ValueError(
                    f"the reward server {self.url} wants another key ({error}); name its variable in api_key_env"
                ) from error
            if error.status is None or error.status in RETRIED:
                raise
            raise ValueError(f"{self.url} is no reward server ({error}); start one by flowopd serve") from error
        if not isinstance(model, dict) or (model.get("protocol"), model.get("version")) != (PROTOCOL, VERSION):
            raise ValueError(f"{self.url} does not speak version {VERSION} of {PROTOCOL}; start it by flowopd serve")


def _body(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """A request of images (b, 3, H, W) uint8, as the server reads it."""
    texts = {"prompts": [prompt.text for prompt in prompts], "tasks": [prompt.task for prompt in prompts]}
    try:
        metadata = [dict(prompt.metadata) for prompt in prompts]
        return json.dumps({"images": list(map(png, images)), **texts, "metadata": metadata}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of a prompt cannot be sent to a reward server as JSON: {error}") from error


def _scores(reply: dict[str, Any], count: int) -> Scores:
    parts = reply.get("parts") or {}
    if not isinstance(parts, dict):
        raise Unanswered(f"parts are no JSON object: {parts!r:.80}")
    columns = {name: _column(f"part {name!r}", values, count) for name, values in parts.items()}
    return Scores(_column("scores", reply.get("scores"), count), columns)


def _column(name: str, values: object, count: int) -> Tensor:
    """Numbers (count,), NaN for null and for what is not finite."""
    if not isinstance(values, list) or len(values) != count:
        raise Unanswered(f"{name}: expected {count} numbers, got {values!r:.80}")
    if wrong := [value for value in values if not (value is None or isinstance(value, float))]:
        raise Unanswered(f"{name}: expected numbers, got {wrong[0]!r:.80}")
    numbers = torch.tensor([math.nan if value is None else value for value in values])
    return numbers.where(numbers.isfinite(), math.nan)


def _first_error(reply: dict[str, Any]) -> str:
    errors = reply.get("errors")
    return str(next(iter(errors.values()))) if isinstance(errors, dict) and errors else "the server gave none"
