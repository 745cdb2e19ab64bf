"""What was drawn and scored, picture by picture: the one record that every table is computed from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IDENTITY = "made_by.json"


@dataclass(frozen=True)
class Picture:
    """One picture that was scored.

    Args:
        prompt: number of its prompt in the benchmark.
        image: its number among the pictures of the prompt.
        text: of the prompt.
        group: of the prompt, such as its tag.
        seed: of its noise: ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))``.
        scores: by name; None where scoring failed; a part that does not apply is not there.
        figures: what pictures drift by, and how different the pictures of the prompt are.
        file: its PNG beside the record, if it was saved.
    """

    prompt: int
    image: int
    text: str
    group: str
    seed: int
    scores: Mapping[str, float | None]
    figures: Mapping[str, float] = field(default_factory=dict)
    file: str | None = None


class Ledger:
    """A folder with the pictures of one model on one benchmark: JSON lines, written once and never changed.

    Each process appends whole batches to a file of its own. A line that a kill tore is not there; the prompt is drawn
    again, by whichever process.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mended = False

    def pictures(self) -> list[Picture]:
        """All pictures, by prompt and number.

        Raises:
            ValueError: naming a line that is none of ours.
        """
        found: dict[tuple[int, int], Picture] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(_whole_lines(file), 1):
                picture = _read(line, file, number)
                found[picture.prompt, picture.image] = picture
        return [found[key] for key in sorted(found)]

    def append(self, pictures: Sequence[Picture], rank: int = 0) -> None:
        """Write pictures at once, behind the whole lines that are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"pictures-{rank}.jsonl"
        lines = "".join(json.dumps(asdict(picture)) + "\n" for picture in pictures)
        with file.open("ab") as out:
            if not self._mended:
                out.truncate(sum(len(line) + 1 for line in _whole_lines(file)))
            out.write(lines.encode())
        self._mended = True

    def sign(self, identity: Mapping[str, Any]) -> None:
        """Write down what the pictures are made by."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{IDENTITY}.partial"
        partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / IDENTITY)

    def check(self, identity: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Raise unless what is there was made by the same, of the same prompts.

        Raises:
            ValueError: saying what differs.
        """
        signed = self.folder / IDENTITY
        then = json.loads(signed.read_text(encoding="utf-8")) if signed.is_file() else dict(identity)
        differs = [name for name in {**then, **identity} if then.get(name) != identity.get(name)]
        if differs:
            name = differs[0]
            raise self._of_another_run(f"{name} was {then.get(name)} there, and is {identity.get(name)} now")
        for picture in self.pictures():
            if picture.prompt < len(texts) and picture.text != texts[picture.prompt]:
                raise self._of_another_run(f"prompt {picture.prompt} was {picture.text!r} there")

    def _of_another_run(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder} holds the results of another run: {reason}; give another trainer.default_root_dir, or "
            "delete the folder"
        )


def missing(pictures: Iterable[Picture], prompts: int, images: int) -> set[int]:
    """Numbers of the prompts that lack some of their pictures."""
    there = {(picture.prompt, picture.image) for picture in pictures}
    return {number for number in range(prompts) if any((number, image) not in there for image in range(images))}


def _whole_lines(file: Path) -> list[bytes]:
    """Lines that end; what a kill tore does not."""
    return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []


def _read(line: bytes, file: Path, number: int) -> Picture:
    try:
        return Picture(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"line {number} of {file} is no scored picture; delete the folder to score it anew") from error
