"""``flowopd data``: prompt sets as JSON lines, generated here or fetched from where they are published."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from flowopd.core.ranges import at_least
from flowopd.prompts.files import write
from flowopd.prompts.geneval import GenEvalPrompts, official
from flowopd.prompts.ocr import OCRPrompts, parse
from flowopd.prompts.sets import (
    COMPBENCH_SETS,
    DRAWBENCH,
    PAPER_OCR,
    PICKAPIC,
    PICKAPIC_SFW,
    PublishedSet,
    fetch,
    texts,
)
from flowopd.prompts.splits import Split
from flowopd.records import Prompt

Category = Literal["all", "color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex"]


def geneval(out: Path, split: Split = "test", count: int | None = None, seed: int = 0) -> None:
    """GenEval: the official 553 test prompts, byte for byte, or generated training prompts that leave them out.

    Args:
        out: the file to write; its name ends in .jsonl.
        split: which prompts.
        count: how many; default: all of test, 50 000 of train.
        seed: of what is drawn.
    """
    whole = split == "test" and count is None
    prompts = official() if whole else GenEvalPrompts(split).draw(_number(count, 50_000), seed)
    _save(prompts, out, "MIT (the rules and the object names are GenEval's)")


def ocr(out: Path, split: Split = "train", count: int | None = None, seed: int = 0) -> None:
    """Generated prompts that ask for a written text; none of the training texts is in the test split.

    Args:
        out: the file to write; its name ends in .jsonl.
        split: which prompts.
        count: how many; default: 20 000 of train, 1 000 of test.
        seed: of what is drawn.
    """
    default = {"train": 20_000, "test": 1_000}[split]
    _save(OCRPrompts(split).draw(_number(count, default), seed), out, "Apache-2.0, as flowopd")


def ocr_paper(out: Path, split: Split = "test", source: str | None = None, sha256: str | None = None) -> None:
    """The OCR prompts that the paper's scores are of; the test split has 1 018.

    Args:
        out: the file to write; its name ends in .jsonl.
        split: which prompts.
        source: a text file or its URL; default: where Flow-GRPO publishes it.
        sha256: what the source must hash to.
    """
    found = _published(PAPER_OCR, split, source, sha256)
    _save([parse(text) for text in found], out, PAPER_OCR.licence)


def pickapic(
    out: Path, split: Split = "train", sfw: bool = True, source: str | None = None, sha256: str | None = None
) -> None:
    """Pick-a-Pic's captions: what people asked text-to-image models for.

    Args:
        out: the file to write; its name ends in .jsonl.
        split: which prompts.
        sfw: only what is safe for work.
        source: a text file or its URL; default: where Flow-GRPO publishes it.
        sha256: what the source must hash to.
    """
    published = PICKAPIC_SFW if sfw else PICKAPIC
    found = _published(published, split, source, sha256)
    _save([Prompt(text, "pickapic") for text in found], out, published.licence)


def drawbench(out: Path, source: str | None = None, sha256: str | None = None) -> None:
    """DrawBench: 200 prompts of eleven kinds, published with Imagen.

    Args:
        out: the file to write; its name ends in .jsonl.
        source: a text file or its URL; default: where Flow-GRPO publishes it.
        sha256: what the source must hash to.
    """
    found = _published(DRAWBENCH, "test", source, sha256)
    _save([Prompt(text, "drawbench") for text in found], out, DRAWBENCH.licence)


def compbench(out: Path, category: Category = "all", source: str | None = None, sha256: str | None = None) -> None:
    """T2I-CompBench's validation prompts, 300 of each category; their metadata has the category.

    Args:
        out: the file to write; its name ends in .jsonl.
        category: which prompts.
        source: a folder with the benchmark's CATEGORY_val.txt, or its URL; default: the benchmark's repository.
        sha256: what the source of a single category must hash to.

    Raises:
        ValueError: on one hash for all categories.
    """
    if sha256 and category == "all":
        raise ValueError("one sha256 cannot fit the eight files of T2I-CompBench; name one --category")
    prompts: list[Prompt] = []
    for name in list(COMPBENCH_SETS) if category == "all" else [category]:
        address = f"{source.rstrip('/')}/{name}_val.txt" if source else None
        found = _published(COMPBENCH_SETS[name], "val", address, sha256)
        prompts += [Prompt(text, "compbench", {"category": name}) for text in found]
    _save(prompts, out, COMPBENCH_SETS["color"].licence)


def _number(count: int | None, default: int) -> int:
    at_least(1, count=count)
    return count or default


def _published(published: PublishedSet, split: str, source: str | None, sha256: str | None) -> list[str]:
    address = source or published.address.format(split=split)
    data, found = fetch(address, sha256)
    known = "as expected" if sha256 else "not checked: give --sha256 to insist on it"
    print(f"read {address}\n  sha256 {found} ({known})")
    return texts(data, address)


def _save(prompts: Iterable[Prompt], out: Path, licence: str) -> None:
    prompts = list(prompts)
    write(prompts, out)
    print(f"wrote {len(prompts)} prompts to {out}\n  licence: {licence}")


COMMANDS: list[Callable[..., None]] = [geneval, ocr, ocr_paper, pickapic, drawbench, compbench]


def main() -> None:
    """Entry point of ``flowopd data``."""
    options: dict[str, Any] = {"prog": "flowopd data", "exit_on_error": False, "allow_abbrev": False}
    auto_cli(COMMANDS, args=sys.argv[2:], as_positional=False, **options)
