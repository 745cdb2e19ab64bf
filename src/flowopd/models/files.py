"""Folders of models, on this disk or on the hub: what is there, what is missing, and a sentence for every refusal."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

ANSWERS = (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError, HFValidationError, EntryNotFoundError)
OTHER_FILES = ["*.fp16*", "*.bin", "*.msgpack", "*.onnx*", "*.gguf"]  # the same weights once more, in other formats
SCHEDULER_CONFIG = "scheduler_config.json"
SETTLED = 2 * 10**9  # ns: a file that was changed so lately may change again and keep its times


def local_folder(what: str, path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A folder as it is, or the snapshot of a model of the hub with the files that match ``patterns``.

    The token, the cache and the offline mode are huggingface_hub's own.

    Args:
        what: how to call it in sentences: "model", "adapter".
        path: a folder, or a model id of the hub.
        revision: branch, tag or commit on the hub.
        patterns: of the files that are wanted.

    Raises:
        FileNotFoundError: saying what stands between us and the files.
    """
    if Path(path).is_dir():
        return Path(path)
    _refuse_no_id(what, path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[*patterns], ignore_patterns=OTHER_FILES))
    except Exception as error:  # the hub raises many kinds; all of them mean: not here
        raise FileNotFoundError(refusal(error, what, path, revision)) from error


def local_file(what: str, path: str, name: str, revision: str | None) -> Path:
    """A file of a folder, or of a model of the hub; otherwise as ``local_folder``.

    Raises:
        FileNotFoundError: saying what stands between us and the file.
    """
    if (folder := Path(path)).is_dir():
        if (folder / name).is_file():
            return folder / name
        raise FileNotFoundError(f"{what} folder {path!r} has no {name}")
    _refuse_no_id(what, path)
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except Exception as error:
        raise FileNotFoundError(refusal(error, what, path, revision, name)) from error


def _refuse_no_id(what: str, path: str) -> None:
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"{what} folder {path!r} does not exist")


def refusal(error: BaseException, what: str, path: str, revision: str | None, name: str = "such file") -> str:
    """What the hub's answer to a request for a model, or for a file of it, means for whoever asked.

    Args:
        error: what was raised; libraries may have wrapped the hub's own error.
        what: how to call it: "model".
        path, revision, name: what was asked for.
    """
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    error = next((cause for cause in causes if isinstance(cause, ANSWERS)), error)
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{path}"
        return f"{what} {path!r} is gated: accept its terms at {page}, then log in (`hf auth login`, or HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} {path!r} of the hub has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"{what} {path!r} is neither a folder nor a model that the hub shows us; check the name, or log in "
            "(`hf auth login`, or HF_TOKEN) if it is private or gated"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{what} {path!r} is not a folder, the hub cannot be reached, and its cache does not hold all of it; "
            "run once with a connection (and without HF_HUB_OFFLINE), or give a folder"
        )
    if isinstance(error, EntryNotFoundError):
        return f"{what} {path!r} of the hub has no {name}"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{what} {path!r} is neither a folder nor a reachable model of the hub ({type(error).__name__}: {first})"


class ModelFiles:
    """A diffusers model by its parts; those on the hub are fetched when they are first asked for, at one commit.

    Args:
        path: a pipeline folder, a folder of the transformer alone, or a model id of the hub.
        revision: branch, tag or commit on the hub.
        pipeline, transformer: names of the classes that are expected there.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        pipeline: str = "StableDiffusion3Pipeline",
        transformer: str = "SD3Transformer2DModel",
    ) -> None:
        self.path = path
        self.revision = revision
        self.pipeline = pipeline
        self.transformer = transformer
        self._root: Path | None = None

    @property
    def remote(self) -> bool:
        """Whether the model lives on the hub."""
        return not Path(self.path).is_dir()

    @property
    def root(self) -> Path:
        """The folder, or the hub's snapshot of one commit; only its small files are sure to be there.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self._root is None:
            self._root = local_folder("model", self.path, self.revision, ["model_index.json", "config.json"])
        return self._root

    def part(self, name: str) -> Path:
        """The folder of a part, such as ``transformer``; ``""`` is a transformer that stands alone.

        Raises:
            FileNotFoundError: if the model has no such part.
        """
        patterns = [f"{name}/*"] if name else ["config.json", "diffusion_pytorch_model*"]
        if self.remote:
            local_folder("model", self.path, self.root.name, patterns)
        folder = self.root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"model {self.path!r} has no {name}; expected a {self.pipeline} folder")
        return folder

    def config(self, name: str) -> dict[str, Any]:
        """The config of a part.

        Raises:
            FileNotFoundError: if the model has no such part.
        """
        file = self.part(name) / (SCHEDULER_CONFIG if name == "scheduler" else "config.json")
        if not file.is_file():
            raise FileNotFoundError(f"model {self.path!r} has no {name}/{file.name}")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def index(self) -> dict[str, Any]:
        """What ``model_index.json`` says, and nothing for a transformer that stands alone.

        Raises:
            FileNotFoundError: if it is neither.
            ValueError: if it is another kind of model.
        """
        for name, expected in (("model_index.json", self.pipeline), ("config.json", self.transformer)):
            if (file := self.root / name).is_file():
                content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                if content.get("_class_name") != expected:
                    raise ValueError(f"model {self.path!r} is a {content.get('_class_name')}; expected a {expected}")
                return content if name == "model_index.json" else {}
        raise FileNotFoundError(f"model {self.path!r} has no model_index.json; expected a {self.pipeline} folder")

    def identity(self, parts: Sequence[str], remembered: Path | None = None) -> str:
        """What tells these parts from any others: the hub's commit, or a digest of all that the files hold.

        Args:
            parts: names of the parts.
            remembered: a JSON file that keeps the digests of files until they change: ten gigabytes take a minute.
        """
        if self.remote:
            return f"{self.path}@{self.root.name}"
        files = sorted(file for part in parts for file in self.part(part).rglob("*") if file.is_file())
        found = digests(files, remembered)
        named = [f"{file.relative_to(self.root).as_posix()} {found[file]}" for file in files]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()[:32]


def digests(files: Sequence[Path], remembered: Path | None = None) -> dict[Path, str]:
    """SHA-256 of every file.

    Args:
        files: to be read to their last byte.
        remembered: a JSON file of what is known already; a digest there counts as long as size and times of the file
            are what they were. Where it cannot be written, nothing is remembered.
    """
    known, found, now = _known_digests(remembered), dict[Path, str](), time.time_ns()
    for file in files:
        facts = file.stat()
        key = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        with file.open("rb") as stream:
            found[file] = known.get(key) or hashlib.file_digest(stream, "sha256").hexdigest()
        if now - facts.st_ctime_ns > SETTLED:
            known[key] = found[file]
    if remembered is not None:
        with suppress(OSError):
            remembered.parent.mkdir(parents=True, exist_ok=True)
            whole = remembered.with_name(f"{remembered.name}.{uuid.uuid4().hex}")
            whole.write_text(json.dumps(known, indent=1), encoding="utf-8")
            whole.replace(remembered)
    return found


def _known_digests(remembered: Path | None) -> dict[str, str]:
    if remembered is None or not remembered.is_file():
        return {}
    try:
        content = json.loads(remembered.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # made anew
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what the libraries say about bad files into one sentence.

    Raises:
        ValueError: naming a safetensors file that cannot be read.
        FileNotFoundError: if something is missing.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        for file in sorted(folder.rglob("*.safetensors")):
            refuse_corrupt(file)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{folder} cannot be read: {first}") from error


def refuse_corrupt(file: Path) -> None:
    """Raise unless the header of a safetensors file agrees with its length.

    Raises:
        ValueError: naming the file.
    """
    try:
        with safe_open(file, "pt"):
            return
    except (SafetensorError, OSError) as error:
        message = f"{file} is not a readable safetensors file ({error}); copy or download it again"
        raise ValueError(message) from error
