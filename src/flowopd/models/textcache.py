"""Encoded prompts, kept in memory and, if asked for, on disk: a second run reads no text encoder.

On disk: ``manifest.json`` says whose encodings these are, and every ``<key>.safetensors`` is one prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flowopd.core.ranges import at_least
from flowopd.records import Conditioning

MANIFEST = "manifest.json"
FORMAT = "1"


@dataclass(frozen=True)
class TextKey:
    """Everything that an encoding depends on, besides the text.

    Args:
        model: identity of the text encoders: commit on the hub, or digest of the files.
        max_sequence_length: text tokens at most.
        dtype: precision of the encoders.
    """

    model: str
    max_sequence_length: int
    dtype: str

    def of(self, text: str) -> str:
        """File name of a text's encoding."""
        parts = [FORMAT, self.model, self.max_sequence_length, self.dtype, text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


class TextMemory:
    """The most recently used encodings, one row each, on the CPU.

    Args:
        limit: largest size, bytes; the newest row stays in any case.
    """

    def __init__(self, limit: int) -> None:
        at_least(0, limit=limit)
        self.limit = limit
        self.size = 0
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._rows

    def get(self, text: str) -> Conditioning | None:
        """The encoding of a text, if it is here."""
        if text in self._rows:
            self._rows.move_to_end(text)
        return self._rows.get(text)

    def put(self, text: str, row: Conditioning) -> None:
        """Keep an encoding, and drop what was not used for longest."""
        if text in self._rows:
            return
        self._rows[text] = row
        self.size += _bytes(row)
        while self.size > self.limit and len(self._rows) > 1:
            self.size -= _bytes(self._rows.popitem(last=False)[1])


class TextFolder:
    """Encodings on disk, one safetensors file each. Several processes may read and write at once.

    Args:
        folder: where; made if it is not there.
        key: what the encodings depend on.
        limit: largest size of all files, bytes; those not used for longest are deleted.

    Raises:
        ValueError: if the folder holds the encodings of another model, or cannot be written to.
    """

    def __init__(self, folder: Path, key: TextKey, limit: int) -> None:
        self.folder = folder
        self.key = key
        self.limit = limit
        self._size: int | None = None
        self._full = False
        self._claim()

    def __contains__(self, text: str) -> bool:
        return self._file(text).is_file()

    def get(self, text: str) -> Conditioning | None:
        """The encoding of a text, if it is here and whole."""
        file = self._file(text)
        try:
            with safe_open(file, "pt") as content:
                if (content.metadata() or {}).get("text") != text:
                    return None
                row = Conditioning(**{name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
            os.utime(file)  # its time of use
        except (FileNotFoundError, SafetensorError):  # a broken file is made anew
            return None
        return row

    def put(self, text: str, row: Conditioning) -> None:
        """Write an encoding. A disk that refuses costs time, not the run: it is told once."""
        content = save({name: part.contiguous() for name, part in row.parts().items()}, {"text": text})
        try:
            _write_whole(self._file(text), content)
        except OSError as error:
            if not self._full:
                warnings.warn(f"text cache {self.folder} cannot be written to: {error}", stacklevel=2)
            self._full = True
            return
        if self._size is None:
            self._size = sum(size for _, size, _ in self._files())
        else:
            self._size += len(content)
        if self._size > self.limit:
            self._shrink()

    def _claim(self) -> None:
        manifest = self.folder / MANIFEST
        mine = {"format": FORMAT, "model": self.key.model}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.is_file():
                _write_whole(manifest, json.dumps(mine, indent=1).encode())
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"text cache {str(self.folder)!r} cannot be used: {error}") from error
        if found != mine:
            raise ValueError(
                f"text cache {str(self.folder)!r} holds the encodings of {found.get('model')}, but this model is "
                f"{self.key.model}; give every model a folder of its own"
            )

    def _file(self, text: str) -> Path:
        return self.folder / f"{self.key.of(text)}.safetensors"

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of use, size and path of every file; others may delete them meanwhile."""
        found = []
        for file in self.folder.glob("*.safetensors*"):
            try:
                found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
            except FileNotFoundError:
                continue
        return sorted(found)

    def _shrink(self) -> None:
        """Delete what was not used for longest, down to nine tenths of the limit, so that it is not done every time."""
        files = self._files()
        self._size = sum(size for _, size, _ in files)
        for _, size, file in files[:-1]:
            if self._size <= 0.9 * self.limit:
                break
            file.unlink(missing_ok=True)
            self._size -= size


def _write_whole(file: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees all of it or nothing, whoever else writes the same."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(row: Conditioning) -> int:
    return sum(part.nbytes for part in row.parts().values())
