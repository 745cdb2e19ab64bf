"""``flowopd serve``: any reward behind HTTP, by LitServe. JSON and PNG, nothing that could be code.

    POST /v1/score  {"images": [base64 of PNG, JPEG or WebP], "prompts": [text],
                     "tasks"?: [name], "metadata"?: [object]}
                    → {"scores": [number | null], "parts": {name: [number | null]}, "errors": {row: sentence},
                       "model": class path, "version": 1}
    GET  /health    200 "ok", or 503 while a worker still starts
    GET  /info      {"model": {"protocol", "version", "reward"}, "server": …}

A bad request is answered by 422 and one sentence, one beyond ``LIMITS["bytes"]`` by 413.
"""

import base64
import hmac
import io
import json
import logging
import multiprocessing
import signal
import socket
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowopd.core.ranges import above, at_least, within
from flowopd.records import Prompt
from flowopd.rewards.base import Reward, Scores, detailed
from flowopd.rewards.remote.client import PROTOCOL, VERSION
from flowopd.rewards.remote.http import key_in

LIMITS = {  # of a request
    "bytes": 1 << 29,
    "images": 1024,
    "side": 4096,  # pixels, of an image
    "pixels": 1 << 27,  # of all images
    "prompt": 1 << 16,  # characters
    "depth": 64,  # of metadata
}
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class ScoreRequest:
    """What a client asks.

    Args:
        images: pictures of one size; base64 of PNG, JPEG or WebP.
        prompts: a text for each.
        tasks: the name of each prompt's task.
        metadata: what the reward needs besides the text.
    """

    images: list[str]
    prompts: list[str]
    tasks: list[str] | None = None
    metadata: list[dict[str, Any]] | None = None


def read(payload: dict[str, Any]) -> tuple[Tensor, list[Prompt]]:
    """The images (B, 3, H, W) in [0, 1] and the prompts of a request.

    Raises:
        ValueError: in one sentence, if it is not one.
    """
    from pydantic import TypeAdapter, ValidationError  # comes with litserve

    try:
        request = TypeAdapter(ScoreRequest).validate_python(payload)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'request'}: {first['msg']}") from error
    count = len(request.images)
    tasks, metadata = request.tasks or [""] * count, request.metadata or [{}] * count
    if not count or not len(request.prompts) == len(tasks) == len(metadata) == count:
        raise ValueError(
            f"expected as many prompts, tasks and metadata as images, and one at least, got {count} images, "
            f"{len(request.prompts)} prompts, {len(tasks)} tasks and {len(metadata)} metadata"
        )
    _at_most("images", count, "images")
    for number, (prompt, facts) in enumerate(zip(request.prompts, metadata, strict=True)):
        _at_most("prompt", len(prompt), f"prompts.{number}: characters")
        _at_most("depth", _depth(facts), f"metadata.{number}: levels of nesting")
    return _pictures(request.images), list(map(Prompt, request.prompts, tasks, metadata))


def _at_most(limit: str, found: int, what: str) -> None:
    if found > LIMITS[limit]:
        raise ValueError(f"{what}: {found}; expected {LIMITS[limit]} at most")


def _depth(value: object) -> int:
    """How deeply lists and objects are nested; without recursion, which has a limit of its own."""
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: object) -> Collection[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _pictures(images: Sequence[str]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]; all sizes are known before any pixel is read."""
    opened = [_opened(number, text) for number, text in enumerate(images)]
    if len(sizes := {image.size for image in opened}) > 1:
        raise ValueError(f"expected images of one size, got {sorted(sizes)} (width, height)")
    _at_most("pixels", sum(image.width * image.height for image in opened), "images: pixels in all")
    return torch.stack([_pixels(number, image) for number, image in enumerate(opened)]).float() / 255


def _opened(number: int, text: str) -> Image.Image:
    try:
        data = io.BytesIO(base64.b64decode(text, validate=True))
    except ValueError:
        raise ValueError(f"images.{number}: expected base64, got {text[:20]!r}") from None
    with _whole(number), warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        image = Image.open(data, formats=FORMATS)
    _at_most("side", max(image.size), f"images.{number}: pixels of a side")
    return image


def _pixels(number: int, image: Image.Image) -> Tensor:
    """One image (3, H, W) uint8."""
    with _whole(number):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextmanager
def _whole(number: int) -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own guard
        raise ValueError(f"images.{number}: far more than {LIMITS['side']} pixels of a side") from None
    except UnidentifiedImageError:  # its words name an object of Python
        raise ValueError(f"images.{number}: expected the base64 of a PNG, JPEG or WebP") from None
    except Exception as error:  # a broken picture raises many kinds
        raise ValueError(f"images.{number}: a broken PNG, JPEG or WebP ({error})") from error


def reply(scores: Scores, name: str) -> dict[str, Any]:
    """The answer of a reward called ``name``; what is not a finite number is null, and said to be."""
    values = _nullable(scores.value)
    return {
        "scores": values,
        "parts": {part: _nullable(numbers) for part, numbers in scores.parts.items()},
        "errors": {str(row): "the reward failed on this image" for row, value in enumerate(values) if value is None},
        "model": name,
        "version": VERSION,
    }


def _nullable(numbers: Tensor) -> list[float | None]:
    return [number if np.isfinite(number) else None for number in numbers.tolist()]


@cache
def _api() -> type:
    """The class that LitServe's workers run; made here, for litserve is optional."""
    try:
        from litserve import LitAPI
    except ImportError:
        raise ImportError('flowopd serve needs litserve; pip install "flowopd[serve]"') from None
    from fastapi import HTTPException, Request

    class RewardAPI(LitAPI):  # type: ignore[misc]
        """A reward, made anew in each worker from its part of the config."""

        def __init__(self, config: str, key: str | None) -> None:
            super().__init__(api_path="/v1/score")
            self.config, self.key = config, key

        def setup(self, device: str) -> None:
            self.reward, self.name = build(self.config), _name(self.config)

        def decode_request(self, request: dict) -> tuple[Tensor, list[Prompt]]:  # type: ignore[type-arg]
            try:
                return read(request)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error

        def predict(self, x: tuple[Tensor, list[Prompt]]) -> dict[str, Any]:
            try:
                return reply(detailed(self.reward, x[0].to(self.device), x[1]), self.name)
            except (ValueError, FileNotFoundError, ImportError) as error:
                raise HTTPException(422, str(error)) from error

        def encode_response(self, output: dict[str, Any]) -> dict:  # type: ignore[type-arg]
            return output

        def authorize(self, request: Request) -> None:
            given = request.headers.get("X-API-Key", "")
            if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
                raise HTTPException(401, "the key in X-API-Key is missing or wrong")

    RewardAPI.__qualname__ = "RewardAPI"
    return RewardAPI


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a worker finds the class here
    if name != "RewardAPI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _api()


def serve(
    config: str,
    port: int = 8080,
    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1",
    api_key_env: str | None = None,
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    devices: PositiveInt = 1,
    workers: PositiveInt = 1,
    timeout: PositiveFloat = 60.0,
) -> None:
    """Serve a reward over HTTP until SIGTERM or Ctrl-C, for RemoteReward on the other side.

    Args:
        config: of the reward, {"class_path": …, "init_args": {…}} as JSON; each worker makes its own.
        port: 1024 to 65535.
        host: 127.0.0.1 is reached from this machine alone; 0.0.0.0 and :: from everywhere.
        api_key_env: name of the environment variable with the key that clients must send; default: anyone may ask.
        accelerator: where the reward finds its images.
        devices: how many of them.
        workers: processes per device.
        timeout: seconds that a request may wait for a free worker.
    """
    at_least(1, devices=devices, workers=workers)
    above(0.0, timeout=timeout)
    options = {"accelerator": accelerator, "devices": devices, "workers_per_device": workers, "timeout": timeout}
    server = _server(config, key_in(api_key_env), options)
    _check_free(host, port)
    signal.signal(signal.SIGTERM, _stop)  # else the workers would stay behind
    print(f"serving {_name(config)} on http://{host}:{port}; stop with Ctrl-C", flush=True)
    try:
        server.run(host=host, port=port, generate_client_file=False, log_level="warning")
    except EOFError:  # of the process that its parts talk through
        raise OSError("a worker died, and the server with it; what it said is above") from None
    finally:
        _end_children()


def _server(config: str, key: str | None, options: dict[str, Any]) -> Any:  # noqa: ANN401 - litserve is untyped
    api = _api()(config, key)
    from fastapi.exceptions import RequestValidationError
    from litserve import LitServer

    described = {"protocol": PROTOCOL, "version": VERSION, "reward": _name(config)}
    options |= {"max_payload_size": LIMITS["bytes"], "model_metadata": described}
    server = LitServer(api, disable_openapi_url=True, **options)
    server.app.add_exception_handler(RequestValidationError, _refuse)
    server.uvicorn_graceful_timeout = 5
    return server


def _name(config: str) -> str:
    return str(json.loads(config)["class_path"])


async def _refuse(_: object, error: Any) -> Any:  # noqa: ANN401 - fastapi's, which is optional
    """The answer to a body that is no JSON object."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"detail": f"expected a JSON object: {error.errors()[0]['msg']}"}, status_code=422)


def _stop(*_: object) -> None:
    """What SIGTERM does: LitServe ends its workers as on Ctrl-C; a worker that inherited this just ends."""
    logging.getLogger("litserve").setLevel(logging.CRITICAL)  # its monitor complains of what is ending
    if multiprocessing.parent_process() is None:
        raise KeyboardInterrupt
    sys.exit(0)


def build(config: str) -> Reward:
    """The reward of a config, {"class_path": …, "init_args": {…}} as JSON.

    Raises:
        ArgumentError: if there is no such class, or it does not take these arguments.
    """
    reads = parser()
    reward: Reward = reads.instantiate(reads.parse_object({"reward": json.loads(config)})).reward
    return reward


def main() -> None:
    """Entry point of ``flowopd serve``."""
    options = parser().parse_args(sys.argv[2:]).as_dict()
    config = json.dumps(options.pop("reward"))
    build(config)  # refuses here what the workers could not make
    options.pop("config")
    serve(config, **options)


def parser() -> ArgumentParser:
    """What ``flowopd serve`` reads its words by."""
    reads = ArgumentParser(prog="flowopd serve", exit_on_error=False, allow_abbrev=False)
    reads.add_argument("--config", action="config", help="a YAML file with these options")
    reads.add_argument("--reward", type=Reward, required=True, help="any reward, by its import path")
    reads.add_function_arguments(serve, skip={"config"})
    return reads


def _check_free(host: str, port: int) -> None:
    """Raise unless the port can be had; the server would end without a word.

    Raises:
        ValueError: if it is out of range.
        OSError: if it is taken.
    """
    within(1024, 65535, port=port)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"port {port} of {host} cannot be had ({error.strerror}); choose another --port") from error


def _end_children(patience: float = 5.0) -> None:
    """End the processes that LitServe left behind, if it was stopped before it was up."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(patience)
        if child.is_alive():
            child.kill()
