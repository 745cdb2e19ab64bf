"""Encoded prompts, whatever the model: encoders are read when a text is missing, and let go once it is encoded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flowopd.models.textcache import TextFolder, TextMemory
from flowopd.records import Conditioning

TEXTS_AT_ONCE = 8  # always: kernels differ by batch size, and a resumed run must find the same encodings to the bit
SMALL_ENCODERS = 256 * 10**6  # bytes; not worth reading twice


class TextEncoders:
    """The text encoders of a model, and what they encoded; each text is encoded once.

    Args:
        read: reads the encoders and their tokenizers, by name.
        encode: encodes B texts, one row each, with what ``read`` returned.
        memory: keeps encodings of this process.
        keep: keep the encoders once they are read; default: if they take less than 256 MB.

    Attributes:
        folder: keeps encodings for the next run, if there is one.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Any]],
        encode: Callable[[Mapping[str, Any], Sequence[str]], Conditioning],
        memory: TextMemory,
        keep: bool | None = None,
    ) -> None:
        self.memory = memory
        self.folder: TextFolder | None = None
        self.keep = keep
        self._read = read
        self._encode = encode
        self._parts: Mapping[str, Any] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoders are in memory."""
        return self._parts is not None

    def parts(self) -> Mapping[str, Any]:
        """The encoders and their tokenizers by name, read if they are not in memory."""
        if self._parts is None:
            self._parts = self._read()
        return self._parts

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, a row each, on the CPU."""
        rows = {text: row for text in dict.fromkeys(texts) if (row := self._kept(text)) is not None}
        rows |= self._encode_missing([text for text in dict.fromkeys(texts) if text not in rows])
        return Conditioning.cat([rows[text] for text in texts])

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode texts that will be needed soon: the encoders are read once for all."""
        kept = (self.memory, self.folder or ())
        self._encode_missing([text for text in dict.fromkeys(texts) if not any(text in place for place in kept)])

    def release(self) -> None:
        """Free the encoders, unless they are small or to be kept."""
        encoders = [part for part in (self._parts or {}).values() if isinstance(part, nn.Module)]
        small = sum(p.nbytes for encoder in encoders for p in encoder.parameters()) <= SMALL_ENCODERS
        if small if self.keep is None else self.keep:
            return
        self._parts = None
        del encoders
        gc.collect()  # modules of transformers refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _kept(self, text: str) -> Conditioning | None:
        row = self.memory.get(text)
        if row is None and self.folder is not None and (row := self.folder.get(text)) is not None:
            self.memory.put(text, row)
        return row

    @torch.no_grad()
    def _encode_missing(self, texts: Sequence[str]) -> dict[str, Conditioning]:
        encoded: dict[str, Conditioning] = {}
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts[start : start + TEXTS_AT_ONCE]
            padding = [""] * (TEXTS_AT_ONCE - len(chunk))
            rows = self._encode(self.parts(), [*chunk, *padding]).to("cpu")
            for i, text in enumerate(chunk):
                encoded[text] = rows[i : i + 1].trimmed().copied()
                self.memory.put(text, encoded[text])
                if self.folder is not None:
                    self.folder.put(text, encoded[text])
        if texts:
            self.release()
        return encoded
