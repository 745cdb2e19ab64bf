"""The client of a reward server: any reward behind ``flowopd serve``, on another machine or in another environment."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import requests
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from flowopd.records import Prompt
from flowopd.rewards.base import Scores, as_bytes
from flowopd.rewards.executor import joined

log = logging.getLogger(__name__)

PROTOCOL, VERSION = "flowopd-reward", 1
RETRIED = (408, 429, 500, 502, 503, 504)


class Unanswered(Exception):
    """Why a request has no usable answer.

    Args:
        reason: in a few words.
        status: of the reply, if there was one.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


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
        on_failure: Literal["nan", "raise"] = "nan",
        batch_size: int = 16,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; expected the address of a reward server, such as http://127.0.0.1:8080")
        if timeout <= 0 or retries < 0 or batch_size < 1:
            raise ValueError("expected timeout > 0, retries >= 0 and batch_size >= 1")
        self.url = url.rstrip("/")
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
        return joined([self._asked(pictures[chunk], prompts[chunk]) for chunk in chunks], images.device)

    def _asked(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        body = _body(images, prompts)
        try:
            session = self._connected()
            reply = self._exchange(session, "POST", "/v1/score", body)
            scores, reason = _scores(reply, len(prompts)), _first_error(reply)
        except Unanswered as error:
            scores, reason = Scores(torch.full((len(prompts),), math.nan)), str(error)
        self._count(scores.value, reason)
        return scores

    def _count(self, scores: Tensor, reason: str) -> None:
        if failed := int(scores.isnan().sum()):
            self.failures += failed
            message = f"reward server {self.url}: {failed} of {len(scores)} images got no score: {reason}"
            if self.on_failure == "raise":
                raise ConnectionError(message)
            log.warning(message)

    def _connected(self) -> requests.Session:
        """The session; until it has succeeded once, ask the server what it is."""
        if self._session is None:
            session = _session(self.retries, self._key())
            self._check(session)
            self._session = session
        return self._session

    def _check(self, session: requests.Session) -> None:
        try:
            model = self._exchange(session, "GET", "/info").get("model")
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

    def _exchange(self, session: requests.Session, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """The object that answers a request.

        Raises:
            Unanswered: if there is none.
        """
        kind = {"Content-Type": "application/json"}
        try:
            response = session.request(method, self.url + path, data=body, headers=kind, timeout=self.timeout)
        except requests.RequestException as error:
            cause = getattr(error.args[0] if error.args else None, "reason", None) or error  # what the last try met
            raise Unanswered(type(cause).__name__) from error
        try:
            reply = response.json(parse_int=float)
        except ValueError:
            reply = None
        if not response.ok:
            detail = reply["detail"] if isinstance(reply, dict) and "detail" in reply else response.text[:80]
            raise Unanswered(f"status {response.status_code}, {detail}", response.status_code)
        if not isinstance(reply, dict):
            raise Unanswered(f"the reply is no JSON object: {response.text[:80]!r}")
        return reply

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env)):
            raise ValueError(f"the key is expected in the environment variable {self.api_key_env!r}, which is empty")
        return key


def _session(retries: int, key: str | None) -> requests.Session:
    again = Retry(
        total=retries,
        allowed_methods=None,  # any: scoring twice does no harm
        status_forcelist=RETRIED,
        backoff_factor=0.5,
        backoff_max=30,
        retry_after_max=30,
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=again))
    session.headers.update({"X-API-Key": key} if key else {})
    return session


def _body(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """A request of images (b, 3, H, W) uint8, as the server reads it."""
    pictures = [base64.b64encode(_png(image)).decode() for image in images]
    texts = {"prompts": [prompt.text for prompt in prompts], "tasks": [prompt.task for prompt in prompts]}
    try:
        metadata = [dict(prompt.metadata) for prompt in prompts]
        return json.dumps({"images": pictures, **texts, "metadata": metadata}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of a prompt cannot be sent to a reward server as JSON: {error}") from error


def _png(image: Tensor) -> bytes:
    """An image (3, H, W) uint8, without loss."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


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
