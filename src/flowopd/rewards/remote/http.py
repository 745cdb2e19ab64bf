"""What the clients of servers share: bounded tries, a key from the environment, PNG, and JSON in both directions."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from flowopd.core.ranges import at_least, within

log = logging.getLogger(__name__)

RETRIED = {408, 429, *range(500, 600)}
OnFailure = Literal["nan", "raise"]


class Unanswered(Exception):
    """Why a request has no usable answer.

    Args:
        reason: in a few words.
        status: of the reply, if there was one.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def check_patience(timeout: float, retries: int) -> None:
    """Raise unless a request may take some seconds, a day at most, and be repeated 0 times or more.

    Raises:
        ValueError: naming the number.
    """
    within(0.001, 86_400.0, timeout=timeout)
    at_least(0, retries=retries)


def address(url: str, whose: str) -> str:
    """The URL without slashes at its end.

    Raises:
        ValueError: if it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}; expected the address of {whose}")
    return url.rstrip("/")


def new_session(retries: int, headers: Mapping[str, str], connections: int = 1) -> requests.Session:
    """A session that tries again what may pass: 0, 1, 2, 4, ... seconds later, or when the server says, within 30."""
    again = Retry(
        total=retries,
        other=0,
        allowed_methods=None,  # any: scoring twice does no harm
        status_forcelist=RETRIED,
        backoff_factor=0.5,
        backoff_max=30,
        retry_after_max=30,
        raise_on_status=False,
    )
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=again))
    made.headers.update({"Content-Type": "application/json", **headers})
    return made


def exchange(
    session: requests.Session, method: str, url: str, timeout: float, body: bytes | None = None
) -> dict[str, Any]:
    """The object that answers a request; its whole numbers are floats.

    Raises:
        Unanswered: if there is none.
    """
    try:
        response = session.request(method, url, data=body, timeout=timeout)
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


def key_in(variable: str | None) -> str | None:
    """The key in an environment variable; None if none is named.

    Raises:
        ValueError: if the variable is empty.
    """
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ValueError(f"the key is expected in the environment variable {variable!r}, which is empty")
    return key


def png(image: Tensor) -> str:
    """The image (3, H, W) uint8 in base64; little compression, since the network is faster than zlib."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def tell(who: str, failed: int, of: int, reason: object, on_failure: OnFailure) -> None:
    """Say in the log that images got no score.

    Raises:
        ConnectionError: if that ends the run.
    """
    message = f"{who}: {failed} of {of} images got no score: {reason}"
    if on_failure == "raise":
        raise ConnectionError(message)
    log.warning(message)
