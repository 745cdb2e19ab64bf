"""What a page is made of: sections of blocks, which the templates show in HTML and in Markdown alike."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff\xe0": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """A picture that is embedded in the page, and a file beside it.

    Args:
        file: its name.
        data: PNG or JPEG.
        alt: what it shows, in words.
        caption: shown below it.
        pixels: whether it is small and to be shown with square pixels.
    """

    file: str
    data: bytes
    alt: str
    caption: str = ""
    pixels: bool = False

    @property
    def source(self) -> str:
        """As a URI that holds it."""
        return f"data:{MEDIA[self.data[:4]]};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: Sequence[str]
    kind: str = "text"


@dataclass(frozen=True)
class Points:
    """A list; each point is its head and what is said of it."""

    points: Sequence[tuple[str, str]]
    kind: str = "points"


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Args:
        header: names of the columns; the first is that of the rows.
        rows: cells.
        best: (row, column) of cells to be seen first.
        marked: number of the row that the page is about.
        summary: what it is called where it is folded away; shown at once if empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    marked: frozenset[int] = frozenset()
    summary: str = ""
    kind: str = "grid"


@dataclass(frozen=True)
class Figures:
    """Plots side by side, where there is room."""

    pictures: Sequence[Picture]
    kind: str = "figures"


@dataclass(frozen=True)
class Film:
    """Rows of pictures: a label each, and captions above the columns."""

    captions: Sequence[str]
    rows: Sequence[tuple[str, Picture]]
    kind: str = "film"


@dataclass(frozen=True)
class Cards:
    """A card per prompt: its text, and a picture per model with its name and its score."""

    cards: Sequence[tuple[str, Sequence[tuple[str, str, Picture]]]]
    kind: str = "cards"


Block = Text | Points | Grid | Figures | Film | Cards


@dataclass(frozen=True)
class Section:
    """A headed part of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return slug(self.title.lower())


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: of the page.
        about: one line below the title.
        headline: what there is to know first.
        key: a few numbers, each with its name.
        sections: the rest, in order.
    """

    title: str
    about: str
    headline: str
    key: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        """Every picture of the page."""
        found: list[Picture] = []
        for block in (block for section in self.sections for block in section.blocks):
            if isinstance(block, Figures):
                found += block.pictures
            elif isinstance(block, Film):
                found += [picture for _, picture in block.rows]
            elif isinstance(block, Cards):
                found += [picture for _, shown in block.cards for _, _, picture in shown]
        return found


def slug(text: str) -> str:
    """A name for files and links, another one for every text.

    >>> slug("score text_strict"), slug("score val/text <b>")
    ('score-text_strict', 'score-val-text-b-f773')
    """
    name = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")[:60]
    return name if name == text.replace(" ", "-") else f"{name}-{zlib.crc32(text.encode()) & 0xFFFF:04x}".strip("-")


def encoded(image: Image.Image) -> bytes:
    """Small pictures as PNG, to the bit; larger ones as JPEG, which is a tenth of it."""
    file = io.BytesIO()
    if image.height <= 64:
        image.save(file, "PNG", optimize=True)
    else:
        image.convert("RGB").save(file, "JPEG", quality=82)
    return file.getvalue()
